"""The one error a user is meant to read."""


class CogsymError(Exception):
    """A user's input or machine is at fault, and the message says so in one sentence.

    The message names the value, what was expected and what to do. The command line prints it without a traceback and
    exits with `exit_status`.
    """

    exit_status = 2


class SettingError(CogsymError):
    """A setting has a value that it cannot have.

    Attributes:
        name: the setting's in Python; the command line says its own option instead.
        problem: the sentence behind it.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"The setting {name} {problem}")
        self.name, self.problem = name, problem


class NoLogitsError(CogsymError, AttributeError):
    """Code reads the logits of a training step that made none; to `hasattr` and `getattr` they are simply not there."""


class RunStopped(CogsymError):
    """A run ended early; the message says what was saved and how to go on."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class OtherRankFailed(RunStopped):
    """A rank of the same run could not go on, so that this one cannot either."""
