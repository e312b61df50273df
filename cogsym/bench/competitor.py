"""The one interface of whatever ours is set beside."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from cogsym.bench.method import Variant

J = TypeVar("J")
M = TypeVar("M")


@dataclass(frozen=True)
class Competitor(Generic[J, M]):
    """One way to do a job.

    Attributes:
        name: as tables show it.
        applied: gives its method for the job, such as a loss to call; what it changes is undone at the end.
        needs: a package that must be there, or None.
        gpu: runs on a GPU only.
        full: only for a full run, and why.
        refused: why it is never timed here, or the empty string.
    """

    name: str
    applied: Callable[[J], AbstractContextManager[M]]
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

    def variant(self, job: J, run: Callable[[M], object], scale: float = 1.0) -> Variant:
        """A variant that is applied during its turns, and whose `run` is given its method for the job."""
        applied: list[M] = []

        @contextmanager
        def context() -> Iterator[None]:
            with self.applied(job) as made:
                applied[:] = [made]
                yield

        return Variant(lambda: run(applied[0]), context, scale=scale)
