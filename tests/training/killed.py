"""Runs that are gone in the middle of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cogsym.training.trainer import OuterTrainer


class Killed(BaseException):
    """Stands for a process that is gone."""


@contextmanager
def killed_in_step(number: int) -> Iterator[None]:
    """Expects that a run inside is gone in this step, before its weights change."""
    check = OuterTrainer.check_gradients

    def dies(self: OuterTrainer) -> None:
        if self.state.global_step == number - 1:
            raise Killed
        check(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(OuterTrainer, "check_gradients", dies)
        yield
