"""The one interface of whatever ours is set beside."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

J = TypeVar("J")
W = TypeVar("W")


@dataclass(frozen=True)
class Competitor(Generic[J, W]):
    """One way to do a job.

    Attributes:
        name: as tables show it.
        turn: gives the way to do it; what it changes is undone when the turn ends.
        needs: a package that must be there, or None.
        gpu: runs on a GPU only.
        full: only for a full run, and why.
        refused: why it is never timed here, or the empty string.
    """

    name: str
    turn: Callable[[J], AbstractContextManager[W]]
    needs: str | None = None
    gpu: bool = False
    full: str = ""
    refused: str = ""

    def unavailable(self, device: torch.device, full: bool) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.gpu and device.type != "cuda":
            return "it runs on a GPU only"
        if self.refused:
            return self.refused
        return self.full if self.full and not full else None


class Turn(Generic[J, W]):
    """A competitor's turns at a job, and its way while one lasts."""

    def __init__(self, competitor: Competitor[J, W], job: J) -> None:
        self._competitor, self._job = competitor, job
        self._way: W | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While this lasts, `way` is there."""
        with self._competitor.turn(self._job) as self._way:
            yield

    @property
    def way(self) -> W:
        """What the competitor gave for this turn."""
        assert self._way is not None
        return self._way
