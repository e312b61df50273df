"""How far a sweep is: documents, layer-forwards per second, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cogsym.heartbeat import Heartbeat, clock


def counted(number: int, name: str) -> str:
    """Such as "1 piece" and "2,000 pieces"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


class SweepProgress:
    """A bar on a terminal, a line a minute elsewhere, and one after the first documents."""

    def __init__(self, console: Console, total: Mapping[str, int], weights: Mapping[str, float]) -> None:
        """Start at 0 of so many documents of each task, each taking so long beside those of other tasks."""
        self._console, self._total, self._weights = console, sum(total.values()), weights
        self._done, self._computed, self._end = 0, 0.0, 0.0
        self._left = sum(number * weights[task] for task, number in total.items())
        self._forwards = 0.0
        self._began = time.monotonic()
        self._heartbeat, self._doing = Heartbeat(self._tell), "sweep"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} documents"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("sweep", total=self._total, detail="", left="")

    def forwards(self, number: float) -> None:
        """So many layers have been computed, each for one state of the documents at hand."""
        self._forwards += number
        self._bar.update(self._task, detail=self._rate(), left=self._time_left())

    def documents(self, task: str, number: int, computed: bool) -> None:
        """So many documents of a task are done; or were before."""
        first = computed and not self._computed
        self._done += number
        self._computed += number * computed * self._weights[task]
        self._left -= number * self._weights[task]
        if self._computed:  # as of now: what is under way is not known to be late
            self._end = self._seconds() * (1 + self._left / self._computed)
        self._bar.update(
            self._task, description=task, completed=self._done, detail=self._rate(), left=self._time_left()
        )
        self._doing = task
        if not self._console.is_terminal and (first or self._done == self._total):
            self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            line = (
                f"{self._doing}: {self._done}/{self._total} documents, {self._rate()}, {clock(self._seconds())} elapsed"
            )
            self._console.print(f"{line}{self._time_left()}", highlight=False, markup=False, soft_wrap=True)

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)

    def _rate(self) -> str:
        return f"{self._forwards / self._seconds():,.0f} layer-forwards/s"

    def _time_left(self) -> str:
        """By how long the documents have taken so far; nothing before the first."""
        return f", {clock(max(0.0, self._end - self._seconds()))} left" if self._computed else ""

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        if not self._console.is_terminal:
            self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.stop()
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._bar.stop()
