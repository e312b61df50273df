"""The processes that share out one run, as torchrun, `accelerate launch` or Slurm start them: its ranks.

They are told by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, as PyTorch reads them. What is agreed
on here goes over gloo, beside the gradients, which go over NCCL on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from cogsym.errors import CogsymError, OtherRankFailed

T = TypeVar("T")
E = TypeVar("E", bound=CogsymError)

_PATIENCE = timedelta(days=7)  # with a rank that has more to do; one that is gone is noticed at once
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused")  # gloo's words


def rank_here() -> int:
    """The number of this process as its launcher says, without waiting for the others; 0 where there is none."""
    return int(os.environ["RANK"]) if _started() else 0


def speaks(error: CogsymError) -> bool:
    """Whether this rank tells an error: not where all have it, or another one is at fault."""
    return rank_here() == 0 or (join.cache_info().currsize > 0 and not isinstance(error, OtherRankFailed))


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        group: in which they agree; None where there is one.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that checks, writes and tells."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, on all of them.

        Raises:
            OtherRankFailed: it raised there, as it does here on the first rank itself.
        """
        if self.size == 1:
            return work()
        return self._shared(work if self.first else None)[0]

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` gives here, once it has given something on every rank; in it no rank waits for another.

        Raises:
            OtherRankFailed: it raised on a rank before this one; else this one raises what its own `work` did.
        """
        return work() if self.size == 1 else self._shared(work, give=False)[self.rank]

    def _shared(self, work: Callable[[], T] | None, give: bool = True) -> dict[int, T]:
        """What `work` gave by rank, here or, with `give`, everywhere."""
        given, failure, mine = dict[int, T](), None, {}
        try:
            if work is not None:
                mine = {self.rank: work()}
        except BaseException as error:
            failure = error
        status = getattr(failure, "exit_status", 1) if failure else None
        for other, (told, its) in enumerate(self._gathered((status, mine if give else None))):
            if told is not None:
                if failure is not None and (other == self.rank or not isinstance(failure, CogsymError)):
                    raise failure
                raise OtherRankFailed(f"Rank {other} could not go on, and its own message says why.", told)
            given |= its or {}
        return given if give else mine

    def wait(self) -> None:
        """Go on when every rank is here."""
        self._gathered(None)

    def total(self, value: float) -> float:
        """The sum over the ranks."""
        return sum(self._gathered(value))

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self._gathered(value))

    def once(self, error: E) -> E | OtherRankFailed:
        """An error that every rank has raised: told by the first one alone."""
        return error if self.first else OtherRankFailed("Told by rank 0.", error.exit_status)

    def lost(self, error: BaseException) -> bool:
        """Whether another rank has gone away."""
        from torch.distributed import DistError

        return self.size > 1 and (isinstance(error, DistError) or any(words in str(error) for words in _GONE))

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values = [None] * self.size
        try:
            distributed.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            if not self.lost(error):
                raise
            raise gone() from error
        return values


ALONE = Ranks()


def gone() -> OtherRankFailed:
    """The error of a run in which a rank is lost."""
    return OtherRankFailed(
        "Another rank of this run has ended; what was written is whole, and the same command with --resume goes on."
    )


@cache
def join() -> Ranks:
    """Meet the other ranks of this run, of which there may be none.

    Raises:
        CogsymError: they cannot be met.
    """
    if not _started():
        return ALONE
    import torch
    from torch import distributed

    try:
        if not distributed.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                local = os.environ.get("LOCAL_RANK", rank_here() % torch.cuda.device_count())
                torch.cuda.set_device(int(local))
            distributed.init_process_group("nccl" if cuda else "gloo")
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise CogsymError(
            f"The ranks of this run did not meet ({str(error).splitlines()[0]}); start them with torchrun, or set "
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each of them."
        ) from error
    return Ranks(distributed.get_rank(), distributed.get_world_size(), group)


def _started() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
