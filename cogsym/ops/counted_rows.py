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
    """The rows of hidden states, [..., D], whose target is not `ignore_index`. A GPU is waited for once.

    Raises:
        IndexError: a target outside [0, V).
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]).contiguous(), targets.reshape(-1).contiguous()
    if not len(targets):
        return Rows(hidden, targets, None)
    counts = targets != ignore_index
    number, *limits = torch.stack([counts.sum(), *torch.where(counts, targets, 0).aminmax()]).tolist()
    for target in limits if number else ():
        if not 0 <= target < V:
            raise IndexError(
                f"linear_cross_entropy: a target is {target}, expected 0 to {V - 1} or ignore_index {ignore_index}."
            )
    if number == len(targets):
        return Rows(hidden, targets, None)
    index = counts.nonzero_static(size=number)[:, 0]
    return Rows(hidden[index], targets[index], index)
