"""What configurations write: rows = configurations × requests decode together.

Decoding is bound by reading the weights, so all rows take a step together and finished rows leave. As in scoring, a
state that rows share is computed once: two rows share it while the layers applied so far and all tokens so far are the
same. The keys and values of the prompts are stored once for each node of the trie, those of the tokens written once for
each node and history; where a history divides, the new one takes a copy of what is its own.

During a step a state lives in the buffer at the first of its rows. A layer that only some of a state's rows apply
divides it; the part that does not hold the old place is copied to its own first row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cogsym import ops
from cogsym.models import Block
from cogsym.models.attention import AttentionHalf, scaled
from cogsym.models.calls import TokenInputs
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.prefixes import Batch, windowed
from cogsym.sweeps.engine.requests import Generate, Generated
from cogsym.sweeps.engine.sampling import Sampling, Stops
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.layers.trie import Trie, Unit

_HEAD_ROWS = 256  # whose logits exist at a time where tokens are drawn by chance


class _Division(NamedTuple):
    """How a unit divides the states before it: index tensors into the buffer.

    Attributes:
        at: where the states that it applies to are, int64 [cells].
        to: where their outcomes go, [cells].
        rest_at: states of which some rows do not take part and lose their place, [copies].
        rest_to: those rows' new place, [copies].
        rows: the first row of each cell, numpy int64 [cells].
    """

    at: Tensor
    to: Tensor
    rest_at: Tensor
    rest_to: Tensor
    rows: np.ndarray


class _Keys(NamedTuple):
    """Which keys the cells of a unit that attends see.

    Attributes:
        history: of each cell, int64 [cells].
        begins: of the segments of the prompt, and last of what is written, int64 [cells, M + 1].
        ends: of the same; the last of them grows with every step.
        first: the position of each begin, int64 [cells, M + 1].
    """

    history: Tensor
    begins: Tensor
    ends: Tensor
    first: Tensor


class _Plan(NamedTuple):
    """What a unit does in a step, the same for as long as no row leaves and no history divides.

    Attributes:
        unit: the unit.
        division: of the states before it.
        keys: what its cells see; None for an MLP.
    """

    unit: Unit
    division: _Division
    keys: _Keys | None


@dataclass
class _Store:
    """Keys and values of one layer: first the prompts', for each node; then regions of `max_new` tokens.

    Attributes:
        k: [S, KV, d].
        v: like k.
        order: for each node of the trie its place among those of the layer.
        regions: for each row the region of its history's tokens, -1 where its configuration has no attention here.
        used: regions handed out.
    """

    k: Tensor
    v: Tensor
    order: dict[int, int]
    regions: np.ndarray
    used: int


def generate(
    engine: Engine,
    head: SweepHead,
    trie: Trie,
    requests: Sequence[Generate],
    stops: Stops,
    sampling: Sampling | None = None,
) -> list[list[Generated]]:
    """What every configuration writes.

    Args:
        engine: the layers, of which none runs its own forward.
        head: the head.
        trie: the configurations.
        requests: the prompts; together they are one pass.
        stops: where texts end.
        sampling: how tokens are chosen; the most likely ones by default.

    Returns:
        [configuration][request].
    """
    with torch.inference_mode():
        return _Decoder(engine, head, trie, requests, stops, sampling or Sampling()).run()


class _Decoder:
    """One pass. A row is (configuration, request); a history is a request and the tokens written so far."""

    def __init__(
        self,
        engine: Engine,
        head: SweepHead,
        trie: Trie,
        requests: Sequence[Generate],
        stops: Stops,
        sampling: Sampling,
    ) -> None:
        self._engine, self._head, self._trie, self._requests = engine, head, trie, requests
        self._stops, self._sampling = stops, sampling
        self._device = engine.layers.device
        configurations = len(trie.configurations)
        # Rows that share a prompt's keys are neighbours, for attention reads these once for neighbours.
        self._order = np.array(sorted(range(configurations), key=trie.path))
        self._configuration = np.tile(self._order, len(requests))
        self._request = np.repeat(np.arange(len(requests)), configurations)
        self._answers: list[list[Any]] = [[None] * len(requests) for _ in range(configurations)]
        self._chance = [
            sampling.stream(trie.configurations[int(c)].code, requests[int(r)]) if sampling.temperature else None
            for c, r in zip(self._configuration, self._request, strict=True)
        ]
        self._written: list[list[int]] = [[] for _ in requests]  # of each history
        self._history = self._request.copy()  # of each row
        self._max_new = max(request.max_new_tokens for request in requests)
        self._batch = Batch([r.tokens for r in requests], [(i, len(r.tokens) - 1) for i, r in enumerate(requests)])
        self._tokens = len(self._batch.packed.tokens)
        positions = max(len(request.tokens) for request in requests) + self._max_new
        self._inputs = TokenInputs(engine.layers.model, self._batch.packed.tokens.to(self._device), positions)
        self._stores: dict[int, _Store] = {}
        self._steps = self._node_tables()
        self._plans: list[list[_Plan]] = []  # by layer; empty where they must be made anew
        engine.layers.pack()

    def run(self) -> list[list[Generated]]:
        hidden = self._prefill()
        step = 0
        while True:
            chosen = self._choose(hidden)
            stays = self._write(chosen)
            if not stays.any():
                return self._answers
            self._divide(chosen, stays, step)
            hidden = self._forward(step)
            step += 1

    def _node_tables(self) -> list[tuple[Unit, np.ndarray, np.ndarray]]:
        """For each unit in order: the node that it makes of each configuration, -1 where there is none, and the node
        that the configuration was at before."""
        trie = self._trie
        configurations: dict[int, list[int]] = {}
        for c in range(len(trie.configurations)):
            for node in trie.path(c):
                configurations.setdefault(node, []).append(c)
        tables, at = [], np.zeros(len(trie.configurations), dtype=np.int64)
        for unit, made in trie.steps():
            node_of = np.full(len(at), -1)
            for node in made:
                node_of[configurations[node]] = node
            tables.append((unit, node_of, at.copy()))
            at = np.where(node_of < 0, at, node_of)
        return tables

    def _prefill(self) -> Tensor:
        """Run the prompts; the hidden state of each row, [rows, D]."""
        hidden: list[Tensor] = [torch.empty(0)] * len(self._trie.configurations)

        def on_keys(unit: Unit, nodes: Sequence[int], k: Tensor, v: Tensor) -> None:
            store = self._stores.get(unit.layer)
            if store is None:
                store = self._stores[unit.layer] = self._new_store(unit.layer, k)
            for state, node in enumerate(nodes):
                places = slice(store.order[node] * self._tokens, (store.order[node] + 1) * self._tokens)
                store.k[places], store.v[places] = k[state], v[state]

        def on_ends(configurations: list[tuple[int, ...]], states: Tensor) -> None:
            for same, state in zip(configurations, states, strict=True):
                for c in same:
                    hidden[c] = state

        self._engine.run(self._trie, self._batch, on_ends, on_keys, self._inputs)
        return torch.stack([hidden[c] for c in self._order], dim=1).flatten(0, 1)

    def _new_store(self, layer: int, like: Tensor) -> _Store:
        there = [node_of for unit, node_of, _ in self._steps if unit.layer == layer and unit.attends]
        node_of = np.stack(there).max(0)[self._configuration]
        order = {int(node): i for i, node in enumerate(np.unique(node_of[node_of >= 0]))}
        rows = np.flatnonzero(node_of >= 0)
        _, region = np.unique(np.stack([node_of[rows], self._history[rows]]), axis=1, return_inverse=True)
        regions = np.full(len(node_of), -1)
        regions[rows] = region
        # Each division of a history makes one more region of what were shared, so there are never more than rows.
        size = len(order) * self._tokens + len(rows) * self._max_new
        k, v = (like.new_empty(size, *like.shape[2:]) for _ in range(2))
        return _Store(k, v, order, regions, int(region.max()) + 1)

    def _choose(self, hidden: Tensor) -> np.ndarray:
        """The next token of each row; `hidden` is [rows, D], and what rows share is looked at once."""
        last = np.asarray(self._trie.last)[self._configuration]
        first, inverse = _states(last, self._history)
        states = hidden[self._index(first)]
        if not self._sampling.temperature:
            no_target = torch.zeros(len(states), dtype=torch.int64, device=states.device)
            return self._head.scores(states[None], no_target).argmax[0].cpu().numpy()[inverse]
        chance = torch.tensor([stream.random() for stream in self._chance if stream], dtype=torch.float64)
        chosen = np.empty(len(inverse), dtype=np.int64)
        for i in range(0, len(inverse), _HEAD_ROWS):
            rows = slice(i, i + _HEAD_ROWS)
            logits = self._head.logits(states[self._index(inverse[rows])])
            chosen[rows] = self._sampling.choose(logits, chance[rows].to(logits.device)).cpu().numpy()
        return chosen

    def _write(self, chosen: np.ndarray) -> np.ndarray:
        """Note the answers of rows that end with the token chosen; which rows stay."""
        stays = np.ones(len(chosen), dtype=bool)
        ended: dict[tuple[int, int], Generated | None] = {}
        for row, (history, token) in enumerate(zip(self._history.tolist(), chosen.tolist(), strict=True)):
            r = int(self._request[row])
            if (history, token) not in ended:
                ended[history, token] = self._stops.ended(self._requests[r], [*self._written[history], token])
            if (answer := ended[history, token]) is not None:
                self._answers[self._configuration[row]][r] = answer
                stays[row] = False
        return stays

    def _divide(self, chosen: np.ndarray, stays: np.ndarray, step: int) -> None:
        """Let finished rows leave, and give rows that chose differently histories of their own."""
        self._configuration, self._request = self._configuration[stays], self._request[stays]
        self._chance = [stream for stream, stay in zip(self._chance, stays, strict=True) if stay]
        old, chosen = self._history[stays], chosen[stays]
        pairs, self._history = np.unique(np.stack([old, chosen]), axis=1, return_inverse=True)
        same = bool(stays.all()) and len(pairs.T) == len(self._written)
        self._written = [[*self._written[h], int(token)] for h, token in pairs.T]
        if same:  # each history has gone on, and keeps its number
            return
        self._plans = []
        for store in self._stores.values():
            store.regions = store.regions[stays]
            rows = np.flatnonzero(store.regions >= 0)
            kinds, inverse = np.unique(
                np.stack([store.regions[rows], self._history[rows]]), axis=1, return_inverse=True
            )
            region = kinds[0]
            again = np.append(False, region[1:] == region[:-1]) if len(region) else np.zeros(0, dtype=bool)
            new = region.copy()
            new[again] = np.arange(store.used, store.used + again.sum())
            store.used += int(again.sum())
            store.regions[rows] = new[inverse]
            if step and again.any():
                for stored in (store.k, store.v):
                    own = stored[len(store.order) * self._tokens :].unflatten(0, (-1, self._max_new))
                    own[self._index(new[again]), :step] = own[self._index(region[again]), :step]

    def _forward(self, step: int) -> Tensor:
        """One token of each row through its layers; their hidden states, [rows, D]."""
        first, _ = _states(np.zeros_like(self._history), self._history)
        tokens = torch.tensor([written[-1] for written in self._written], device=self._device)
        lengths = torch.tensor([len(self._requests[r].tokens) for r in self._request[first]])
        x, position_embeddings = self._inputs(tokens, (lengths + step).to(self._device))
        states = x.new_empty(len(self._history), x.shape[-1])
        states[self._index(first)] = x
        self._plans = self._plans or self._new_plans(step)
        rotation: dict[Any, tuple[Tensor, Tensor]] = {}  # what layers with the same tables and histories share
        needed = [(plans[0].unit.layer, {plan.unit.weights for plan in plans}) for plans in self._plans]
        for plans, loaded in zip(self._plans, self._engine.layers.walk(needed), strict=True):
            for unit, division, keys in plans:
                block = loaded[unit.weights].block
                assert block is not None
                if len(division.rest_at):
                    states[division.rest_to] = states[division.rest_at]
                cells = states[division.at]
                if keys is None:
                    block.add_mlp(cells[None])
                else:
                    self._attend(block, unit, cells, keys, position_embeddings[unit.layer], rotation, step)
                states[division.to] = cells
                self._engine.on_forwards(unit.forwards * len(cells))
        last = np.asarray(self._trie.last)[self._configuration]
        first, inverse = _states(last, self._history)
        return states[self._index(first[inverse])]

    def _index(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self._device)

    def _new_plans(self, step: int) -> list[list[_Plan]]:
        plans: dict[int, list[_Plan]] = {}
        histories: dict[bytes, Tensor] = {}  # one tensor for all layers whose cells have the same
        for unit, node_of, before in self._steps:
            division = self._division(node_of, before)
            if len(division.rows):
                keys = self._keys(division.rows, node_of, unit.layer, step, histories) if unit.attends else None
                plans.setdefault(unit.layer, []).append(_Plan(unit, division, keys))
        return list(plans.values())

    def _keys(
        self, rows: np.ndarray, node_of: np.ndarray, layer: int, step: int, histories: dict[bytes, Tensor]
    ) -> _Keys:
        store = self._stores[layer]
        places = self._batch.places[self._request[rows]]
        nodes = torch.tensor([store.order[int(n)] for n in node_of[self._configuration[rows]]])
        chains = self._batch.packed.chains_at(places)
        chains[..., :2] += (nodes * self._tokens)[:, None, None]
        begin = len(store.order) * self._tokens + torch.from_numpy(store.regions[rows]) * self._max_new
        written = torch.stack([begin, begin + step, self._batch.packed.positions[places] + 1], dim=-1)
        begins, ends, first = (t.contiguous() for t in torch.cat([chains, written[:, None]], dim=1).unbind(-1))
        history = self._history[rows]
        return _Keys(histories.setdefault(history.tobytes(), self._index(history)), begins, ends, first)

    def _division(self, node_of: np.ndarray, before: np.ndarray) -> _Division:
        """What a unit does to the states that rows share."""
        first, inverse = _states(before[self._configuration], self._history)
        takes_part = node_of[self._configuration] >= 0
        nobody = len(takes_part)
        rows = np.arange(nobody)
        part, rest = (np.full(len(first), nobody) for _ in range(2))
        np.minimum.at(part, inverse[takes_part], rows[takes_part])
        np.minimum.at(rest, inverse[~takes_part], rows[~takes_part])
        acting = part < nobody
        loses = acting & (rest < nobody) & (part < rest)
        return _Division(
            at=self._index(first[acting]),
            to=self._index(part[acting]),
            rest_at=self._index(first[loses]),
            rest_to=self._index(rest[loses]),
            rows=part[acting],
        )

    def _attend(
        self,
        block: Block,
        unit: Unit,
        cells: Tensor,
        keys: _Keys,
        position_embeddings: Any,
        rotation: dict[Any, tuple[Tensor, Tensor]],
        step: int,
    ) -> None:
        """Add what a unit that attends adds to cells, [cells, D], each at its own place and over its own keys."""
        store, half = self._stores[unit.layer], block.attention
        assert isinstance(half, AttentionHalf)
        cos, sin = None, None
        if half.rotary is not None:
            key = half.rotary, id(position_embeddings), id(keys.history)
            if key not in rotation:
                cos, sin = (t[keys.history, 0][None] for t in half.rotary.tables(position_embeddings))
                rotation[key] = cos, sin
            cos, sin = rotation[key]
        keys.ends[:, -1].add_(1)
        here = (keys.ends[:, -1] - 1).to(self._device)
        positions = keys.first[:, -1] + step
        begins, ends = windowed(keys.begins, keys.ends, keys.first, positions, half.options.window)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store.k[here], store.v[here] = k[0], v[0]
            if half.query_scale:
                q = scaled(q, half.query_scale(positions.to(q.device)))
            ranges = begins.to(q.device), ends.to(q.device)
            return ops.decode_attention(q[0], store.k, store.v, *ranges, half.in_ranges())[None]

        block.add_attention(cells[None], cos, sin, attend, both=unit.part == "layer")


def _states(node: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the first row of each state, the state of each row), of rows at these nodes with these histories."""
    _, first, inverse = np.unique(node * (history.max() + 1) + history, return_index=True, return_inverse=True)
    return first, inverse
