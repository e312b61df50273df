"""Signals that ask a process to end: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends when it is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, where they are to do what Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Of a process that a signal ended, by the shell's rule: 128 and the signal's number."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler` on each signal that asks this process to end.

    One that is ignored stays ignored, as SIGHUP is under nohup. Python handles signals in the main thread only: in
    another nothing changes.
    """
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Terminated`, the first of them alone, as a closing terminal sends SIGHUP twice."""
    ended = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal ended
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not ended:
            ended = True
            raise Terminated(number)

    with handled(interrupt):
        yield
