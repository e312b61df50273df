"""The engine's other way: layers that are not known to cogsym run their own forward, a state at a time.

States are shared between configurations as ever; sequences are rows of a padded batch and share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogsym.models.calls import layer_calls
from cogsym.sweeps.batch import Batch, OnEnds
from cogsym.sweeps.layers import Layers
from cogsym.sweeps.trie import Schedule, needed


class OwnRun:
    """One pass on the model's own layers."""

    def __init__(self, layers: Layers, schedule: Schedule, batch: Batch, on_ends: OnEnds) -> None:
        """Prepare it; `run` runs it. See `Engine.run`."""
        self._layers, self._schedule, self._on_ends = layers, schedule, on_ends
        ids, mask = padded(batch.sequences)
        self._rows, self._columns = torch.tensor(batch.scored, device=layers.device).unbind(1)
        embedded, self._calls = layer_calls(
            layers.model, input_ids=ids.to(layers.device), attention_mask=mask.to(layers.device)
        )
        self._states = embedded.new_empty(schedule.slots, *embedded.shape)
        self._embedded = embedded

    def run(self) -> None:
        """Compute every state."""
        if self._schedule.start:
            self._end(self._schedule.start, self._embedded)
        if self._schedule.slots:
            self._states[0] = self._embedded
        layers = self._schedule.by_layer()
        for steps, loaded in zip(layers, self._layers.walk(needed(layers)), strict=True):
            for step in steps:
                for copy in step.copies:
                    self._states[copy.target] = self._states[copy.source]
                layer = loaded[step.unit.weights].layer
                for slot in range(step.slots.start, step.slots.stop):
                    y = layer(self._states[slot], **self._calls[step.unit.layer])
                    self._states[slot] = y[0] if isinstance(y, tuple) else y
                for end in step.ends:
                    self._end(end.configurations, self._states[end.slot])

    def _end(self, configurations: tuple[int, ...], state: Tensor) -> None:
        self._on_ends([configurations], state[self._rows, self._columns][None])


def padded(sequences: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 [B, T] each, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return ids, mask
