"""Token sequences that go through the layers together, and which of their hidden states are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cogsym.sweeps.layout import Layout, lay_out

# Below this share of scored positions, states behind which nothing attends exist only there.
_NARROW_BELOW = 0.75

# (configurations, hidden states [states, P, D]): the states that configurations end with, one tuple of them each.
OnEnds = Callable[[list[tuple[int, ...]], Tensor], None]


@dataclass(frozen=True)
class Batch:
    """Sequences as an engine takes them.

    Attributes:
        sequences: token ids, none of them empty.
        scored: (sequence, token of it) whose hidden state is wanted, P of them.
    """

    sequences: Sequence[tuple[int, ...]]
    scored: Sequence[tuple[int, int]]

    @cached_property
    def layout(self) -> Layout:
        """The sequences in one row."""
        return lay_out(self.sequences)

    @cached_property
    def places(self) -> Tensor:
        """Where the scored tokens are in the layout, int64 [P]."""
        return torch.tensor([int(self.layout.places[s][i]) for s, i in self.scored], dtype=torch.int64)

    @property
    def narrow(self) -> bool:
        """Whether it pays to keep some states only at scored positions."""
        return len(self.scored) < _NARROW_BELOW * len(self.layout.tokens)
