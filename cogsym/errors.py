"""The one error a user is meant to read."""


class CogsymError(Exception):
    """A user's input or machine is at fault, and the message says so in one sentence.

    The message names the value, what was expected and what to do. The command line prints it without a traceback and
    exits with `exit_status`.
    """

    exit_status = 2


class RunStopped(CogsymError):
    """A run ended early; the message says what was saved and how to go on."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status
