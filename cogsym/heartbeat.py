"""A sign of life where no terminal shows a bar."""

from __future__ import annotations

import threading
from collections.abc import Callable

SECONDS = 60.0  # from one line to the next


class Heartbeat:
    """Tells, again and again, how far something is; no more than a line a minute, and no less."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """Call `tell` every minute from a thread of its own, once `start` was called."""
        self._tell, self._ended = tell, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; nothing is told any more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SECONDS):
            self._tell()


def clock(seconds: float) -> str:
    """Such as "0:07" and "2:03:20"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
