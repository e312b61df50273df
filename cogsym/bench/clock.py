"""Who may take how long: the turns of a run, the time left, and what a quick run has no time for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from cogsym.bench.case import CaseSpec

LEAST_SECONDS = 0.5  # of a turn, beside what it is known to take: something has to be built


class Clock:
    """Announces turns. Those of a quick run share its time in proportion to what they take at least, and fill it.

    Attributes:
        deadline: of `time.perf_counter`, when the turn that has begun is to end; None is whenever it is done.
    """

    def __init__(self, turns: Sequence[CaseSpec], seconds: float | None, console: Console) -> None:
        """
        Args:
            turns: all that come, in their order.
            seconds: that they have together; None is as many as they take.
            console: where each is announced.
        """
        self.deadline: float | None = None
        self._least = [spec.seconds for spec in turns]
        self._console, self._done = console, 0
        self._started = time.perf_counter()
        self._end = None if seconds is None else self._started + seconds

    def start(self, name: str, spec: CaseSpec) -> bool:
        """Announce the next turn; or False where it has to be left out: with the shorter ones to come there is no time
        for it."""
        now, turns, least = time.perf_counter(), len(self._least), self._least[self._done :]
        done, self._done = self._done, self._done + 1
        left = ""
        if self._end is not None:
            seconds = self._end - now
            fitting = [s for s in least if sum(t for t in least if t <= s) <= seconds]
            if spec.seconds not in fitting or seconds <= 0:
                return False
            share = (spec.seconds + LEAST_SECONDS) / sum(s + LEAST_SECONDS for s in fitting)
            self.deadline = now + seconds * share
            left = f", {_clock(seconds)} left"
        elif done:
            left = f", about {_clock((now - self._started) / done * (turns - done))} left"
        self._console.print(f"[dim]{self._done}/{turns}  {name}{left}[/dim]", highlight=False, soft_wrap=True)
        return True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d}"
