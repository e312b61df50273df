"""The engine: every state that configurations need, computed once, layer by layer.

All states alive at a layer go through it together, so its weights are read once. A state is the residual stream of all
tokens of the documents at hand, [N, D], in a slot of one buffer; several states at a time make the products large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cogsym import ops
from cogsym.errors import CogsymError
from cogsym.models import Block
from cogsym.models.attention import Attend, AttentionHalf, scaled
from cogsym.models.calls import token_inputs
from cogsym.sweeps.engine.fallback import FallbackRun
from cogsym.sweeps.engine.prefixes import Batch, OnEnds
from cogsym.sweeps.engine.weights import LayerSource
from cogsym.sweeps.layers.schedule import Schedule, Step, needed, schedule
from cogsym.sweeps.layers.trie import Topology, Trie, Unit

# Tokens, of all states together, that go through a layer at a time: enough for the products to run at full speed, few
# enough for what lies between them to stay in cache.
TOKENS_AT_ONCE = 4096
# (tokens [N], positions [N]) -> as `token_inputs` of a model.
Inputs = Callable[[Tensor, Tensor], tuple[Tensor, list[Any]]]
# (unit, nodes, keys [states, N, KV, d], values): what an attention unit computed for all tokens of some states.
OnKeys = Callable[[Unit, Sequence[int], Tensor, Tensor], None]


class Engine:
    """Runs the states of a trie on a model's layers.

    Attributes:
        layers: the layers.
        on_forwards: told how many layer-forwards have been done, each of one state, a half counting half.
    """

    def __init__(self, layers: LayerSource) -> None:
        """Run on these layers."""
        self.layers = layers
        self.on_forwards: Callable[[float], None] = lambda number: None

    @property
    def topology(self) -> Topology:
        """How the halves of the layers read the residual stream, as `Trie` takes it."""
        if self.layers.block is None:
            return "whole"
        return "parallel" if self.layers.block.parallel else "sequential"

    def run(
        self, trie: Trie, batch: Batch, on_ends: OnEnds, on_keys: OnKeys | None = None, inputs: Inputs | None = None
    ) -> None:
        """Compute every state of a trie for a batch.

        Args:
            trie: what to compute.
            batch: documents.
            on_ends: told the hidden states that configurations end with, before the final norm, as they come; they are
                its own only until it returns.
            on_keys: told the keys and values of every unit that attends; not by layers that run their own forward.
            inputs: what tokens come to the layers with; None asks the decoder.

        Raises:
            CogsymError: the trie is for layers of another topology.
        """
        if trie.topology != self.topology:
            raise CogsymError(
                f"The trie is for {trie.topology} layers, expected {self.topology}, as the model's are; make it with "
                "Trie(configurations, engine.topology)."
            )
        with torch.inference_mode():
            if trie.topology == "whole":
                FallbackRun(self.layers, schedule(trie, narrow=False), batch, on_ends).run(self.on_forwards)
            else:
                order, ask = schedule(trie, narrow=batch.narrow), inputs or partial(token_inputs, self.layers.model)
                _Run(self.layers, order, batch, on_ends, on_keys, ask).run(self.on_forwards)


class _Run:
    """One pass on our blocks."""

    def __init__(
        self,
        layers: LayerSource,
        schedule: Schedule,
        batch: Batch,
        on_ends: OnEnds,
        on_keys: OnKeys | None,
        inputs: Inputs,
    ) -> None:
        self._layers, self._schedule, self._on_ends, self._on_keys = layers, schedule, on_ends, on_keys
        self._packed, self._device = batch.packed, layers.device
        self._places = batch.places
        self._scored = self._there(batch.places)
        self._starts = self._there(self._packed.starts[None])
        self._ranges: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        embedded, self._positions = inputs(self._there(self._packed.tokens), self._there(self._packed.positions))
        self._embedded = embedded
        self._full = embedded.new_empty(schedule.slots, len(embedded), embedded.shape[-1])
        self._narrow = embedded.new_empty(schedule.narrow_slots, len(self._scored), embedded.shape[-1])

    def _there(self, x: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        return x.to(self._device, non_blocking=True)

    def run(self, on_forwards: Callable[[float], None]) -> None:
        if self._schedule.start:
            self._on_ends([self._schedule.start], self._embedded[None, self._scored])
        if self._schedule.slots:
            self._full[0] = self._embedded
        elif self._schedule.narrow_slots:
            self._narrow[0] = self._embedded[self._scored]
        layers = self._schedule.by_layer()
        for steps, loaded in zip(layers, self._layers.walk(needed(layers)), strict=True):
            for step in steps:
                block = loaded[step.unit.weights].block
                assert block is not None
                self._apply(step, block)
                self._hand_over(step)
                on_forwards(step.unit.forwards * len(step.nodes))

    def _apply(self, step: Step, block: Block) -> None:
        buffer = self._narrow if step.narrow else self._full
        for copy in step.copies:
            buffer[copy.target] = buffer[copy.source]
        if step.unit.part == "mlp":
            for slot, source in zip(range(step.slots.start, step.slots.stop), step.sources, strict=False):
                buffer[slot] = self._full[source, self._scored]
            for states, _ in self._pieces(step, buffer):
                block.add_mlp(buffer[states])
            return
        half, both = block.attention, step.unit.part == "layer"
        assert isinstance(half, AttentionHalf)
        cos, sin = self._tables(half, step.unit.layer)
        for states, nodes in self._pieces(step, self._full):
            attend = self._attend(half, step.unit, nodes, only_scored=bool(step.sources))
            if step.sources:
                sources = step.sources[states.start - step.first : states.stop - step.first]
                x = self._full[self._there(torch.tensor(sources))]
                buffer[states] = block.attention_added_at(x, self._scored, cos, sin, attend, both)
            else:
                block.add_attention(buffer[states], cos, sin, attend, both)

    def _pieces(self, step: Step, buffer: Tensor) -> Iterator[tuple[slice, tuple[int, ...]]]:
        """Slots, and the nodes they hold, a few at a time."""
        many = max(1, TOKENS_AT_ONCE // max(1, buffer.shape[1]))
        for i in range(0, len(step.nodes), many):
            nodes = step.nodes[i : i + many]
            yield slice(step.first + i, step.first + i + len(nodes)), nodes

    def _tables(self, half: AttentionHalf, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """(cos, sin), [1, N, R / 2] each."""
        if half.rotary is None:
            return None, None
        cos, sin = half.rotary.tables(self._positions[layer])
        return cos[None, :, 0], sin[None, :, 0]

    def _attend(self, half: AttentionHalf, unit: Unit, nodes: tuple[int, ...], only_scored: bool) -> Attend:
        """Attention of every token, or of the scored ones, within each state."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self._on_keys:
                self._on_keys(unit, nodes, k, v)
            if half.query_scale:
                positions = self._packed.positions[self._places] if only_scored else self._packed.positions
                q = scaled(q, half.query_scale(self._there(positions)))
            if only_scored:
                return self._attend_ranges(half, "scored", q, k, v)
            if not _on_tiles(half, q):
                return self._attend_ranges(half, "all", q, k, v)
            roots = self._starts.shape[1]
            options = half.at(self._starts.expand(len(q), -1))
            o, _ = ops.attention(q[:, :roots], k[:, :roots], v[:, :roots], options)
            if roots == q.shape[1]:
                return o
            return torch.cat([o, self._attend_ranges(half, "rest", q[:, roots:], k, v)], dim=1)

        return attend

    def _attend_ranges(
        self, half: AttentionHalf, which: Literal["scored", "all", "rest"], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Attention of some tokens of each state to ranges of its own tokens.

        Args:
            half: whose options hold.
            which: tokens the queries are of; "rest" are those with a parent.
            q: [states, P, H, d].
            k: [states, N, KV, d].
            v: like k.
        """
        states, tokens = k.shape[:2]
        window = half.options.window
        if (which, window, states) not in self._ranges:
            if which == "rest":
                ranges = self._packed.ranges(window)
            else:
                places = self._places if which == "scored" else torch.arange(tokens)
                ranges = self._packed.ranges_at(places, window)
            offset = (torch.arange(states) * tokens)[:, None, None]
            begins, ends = (self._there((x + offset).flatten(0, 1)) for x in ranges)
            self._ranges[which, window, states] = begins, ends
        begins, ends = self._ranges[which, window, states]
        o = ops.decode_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), begins, ends, half.in_ranges())
        return o.view(q.shape)

    def _hand_over(self, step: Step) -> None:
        buffer = self._narrow if step.narrow else self._full
        many = max(1, TOKENS_AT_ONCE // max(1, len(self._scored)))
        for i in range(0, len(step.ends), many):
            ends = step.ends[i : i + many]
            slots = self._there(torch.tensor([end.slot for end in ends]))
            hidden = buffer[slots] if step.narrow else buffer[slots[:, None], self._scored]
            self._on_ends([end.configurations for end in ends], hidden)


def _on_tiles(half: AttentionHalf, q: Tensor) -> bool:
    """Whether attention of packed sequences has a kernel on tiles here; elsewhere it would make all logits, and each
    row reads its own range instead."""
    told = {"head_dim": half.head_dim, "window": half.options.window, "soft_cap": half.options.soft_cap}
    if q.device.type == "cpu":
        return True
    return ops.route("attention", q.device, q.dtype, sequences="by starts", **told).backend != "reference"
