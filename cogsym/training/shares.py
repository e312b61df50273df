"""How ranks share out the rows of a run, so that every step has the rows that it has in one process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cogsym.data import PackedDataset
from cogsym.data.packing import IGNORE
from cogsym.errors import CogsymError
from cogsym.training.settings import TrainSettings


def shared_batch(settings: TrainSettings, began_as: int, size: int) -> tuple[int, int]:
    """(Rows a forward pass, such passes a step) of each rank, for the rows a step that the run began with.

    Args:
        settings: of the run, of each rank where it began.
        began_as: how many ranks there were.
        size: how many there are.

    Raises:
        CogsymError: they cannot be shared out evenly.
    """
    rows = settings.batch_size * settings.accumulation * began_as
    if rows % size:
        raise CogsymError(
            f"The run has {rows} rows a step, which {size} ranks cannot share out evenly; resume it on a number of "
            f"ranks that divides {rows}."
        )
    each = rows // size
    batch = next(b for b in range(min(settings.batch_size, each), 0, -1) if each % b == 0)
    return batch, each // batch


class SharedRows(Dataset[dict[str, Tensor]]):
    """Rows, and behind them as many as are missing to a multiple, on which no loss counts: each rank has as many.

    Attributes:
        rows: without those.
    """

    def __init__(self, rows: PackedDataset, multiple: int) -> None:
        """Fill up to a multiple of `multiple` rows."""
        self.rows, self._blanks = rows, -len(rows) % multiple

    def __len__(self) -> int:
        return len(self.rows) + self._blanks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.rows):
            return self.rows[index]
        row = self.rows[0]
        return {**row, "labels": torch.full_like(row["labels"], IGNORE)}


class SharedOrder(Sampler[int]):
    """The order of the rows in one process, and the blank ones last."""

    def __init__(self, shared: SharedRows) -> None:
        """Shuffle by PyTorch's seed, as accelerate does."""
        self._shared, self._order = shared, SeedableRandomSampler(shared.rows)

    def set_epoch(self, epoch: int) -> None:
        """Give the order of an epoch next."""
        self._order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(len(self._shared.rows), len(self._shared))

    def __len__(self) -> int:
        return len(self._shared)
