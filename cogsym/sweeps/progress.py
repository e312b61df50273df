"""How far a sweep is: documents, layer-forwards per second, time left."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cogsym.heartbeat import Heartbeat, clock


def counted(number: int, name: str) -> str:
    """Such as "1 piece" and "2,000 pieces"."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


class SweepProgress:
    """A bar on a terminal, a line a minute elsewhere, and one after the first documents."""

    def __init__(self, console: Console, total: int) -> None:
        """Start at 0 of `total` documents."""
        self._console, self._total = console, total
        self._done = self._computed = 0
        self._forwards = 0.0
        self._began = time.monotonic()
        self._heartbeat, self._doing = Heartbeat(self._tell), "sweep"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} documents"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("sweep", total=total, detail="")

    def forwards(self, number: float) -> None:
        """So many layers have been computed, each for one state of the documents at hand."""
        self._forwards += number
        self._bar.update(self._task, detail=self._detail())

    def documents(self, task: str, number: int, computed: bool) -> None:
        """So many documents of a task are done; or were before."""
        self._done += number
        self._computed += number * computed
        self._bar.update(self._task, description=task, completed=self._done, detail=self._detail())
        self._doing = task
        if not self._console.is_terminal and (self._done == self._total or self._computed == number > 0):
            self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            line = f"{self._doing}: {self._done}/{self._total} documents, {self._detail()}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _detail(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        words = [f"{self._forwards / seconds:,.0f} layer-forwards/s"]
        if not self._console.is_terminal:
            words.append(f"{clock(seconds)} elapsed")
        if self._computed:
            words.append(f"{clock(seconds / self._computed * (self._total - self._done))} left")
        return ", ".join(words)

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
