"""Rows of hidden states of which the head is asked something."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The rows that count."""

    hidden: Tensor  # [rows, D]
    targets: Tensor  # [rows]
    places: Tensor | None  # their places among all rows; None: these are all

    def spread(self, values: Tensor, fill: float, shape: torch.Size) -> Tensor:
        """`values` of the rows, and `fill` for those that do not count."""
        if self.places is None:
            return values.view(shape)
        result = values.new_full(shape, fill)
        result.view(-1, *values.shape[1:]).index_copy_(0, self.places, values)
        return result


def counted(hidden: Tensor, targets: Tensor, ignore_index: int, V: int) -> Rows:
    """The rows of hidden states, [..., D], whose target is not `ignore_index`.

    Raises:
        IndexError: a target outside [0, V).
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]).contiguous(), targets.reshape(-1).contiguous()
    index = (targets != ignore_index).nonzero()[:, 0]
    rows = Rows(hidden, targets, None)
    if len(index) < len(targets):
        rows = Rows(hidden[index], targets[index], index)
    if len(index):
        lowest, highest = (t.item() for t in rows.targets.aminmax())
        if lowest < 0 or highest >= V:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(
                f"linear_cross_entropy: a target is {wrong}, expected 0 to {V - 1} or ignore_index {ignore_index}."
            )
    return rows
