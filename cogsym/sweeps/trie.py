"""What configurations share, and the order in which everything they need is computed once.

A hidden state depends only on the ordered sequence of what has been done to it. A layer that is skipped does nothing,
one that is kept is two units, attention and MLP, and one half of which is skipped is the other unit. The sequences of
units of all configurations make a trie; each of its nodes is one state that is computed once, and a sweep that takes
the units as they are can do with no fewer.

The nodes are computed layer by layer, so that a layer's weights are read once for all of them. States stand in numbered
slots of one buffer, and a step applies one unit in place to a contiguous run of slots: a slice, never a gather. Where a
state is needed again later its child works on a copy, and where a state at rest lies in the run it is moved out.

States behind which nothing attends any more are narrow: they exist only at the positions that are scored. Their last
attention computes keys and values everywhere, and queries, output and MLP only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Literal, NamedTuple

from cogsym.sweeps.configs import Action, Configuration

Part = Literal["attention", "mlp", "layer"]
Weights = Literal["model", "base"]

_ORDER: dict[Part, int] = {"attention": 0, "mlp": 1, "layer": 0}
_COST: dict[Part, float] = {"attention": 0.5, "mlp": 0.5, "layer": 1.0}
_HALVES: dict[Action, tuple[Part, ...]] = {
    "keep": ("attention", "mlp"),
    "skip": (),
    "skip_attention": ("mlp",),
    "skip_mlp": ("attention",),
    "revert": ("attention", "mlp"),
}
_WHOLE: dict[Action, tuple[Part, ...]] = {"keep": ("layer",), "skip": (), "revert": ("layer",)}


class Unit(NamedTuple):
    """What is done to a state at once.

    Attributes:
        layer: index of the decoder layer.
        part: which half of it; "layer" is a whole layer that runs its own forward.
        weights: the model's, or those of the base checkpoint.
    """

    layer: int
    part: Part
    weights: Weights


@dataclass(eq=False)
class Node:
    """A state: the outcome of a sequence of units.

    Attributes:
        unit: the last one; None for the root, the embeddings.
        parent: index of the node before it; the root's is -1.
        children: indices, one for each different unit that follows.
        ends: indices of the configurations whose last state this is.
        narrow: no attention follows, so that only scored positions matter.
    """

    unit: Unit | None
    parent: int
    children: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    narrow: bool = True


class Copy(NamedTuple):
    """One state copied to another slot."""

    source: int
    target: int


class End(NamedTuple):
    """A state that configurations end with, in its slot when its step is done."""

    slot: int
    configurations: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One unit applied to states.

    Attributes:
        unit: what is applied.
        nodes: the states it makes, in the order of their slots.
        narrow: they stand in the buffer of scored positions.
        sources: where `narrow` and the states before were not: their slots in the buffer of all positions. Empty where
            the unit works in place.
        copies: made before, one after the other, within the buffer.
        first: the first slot; the others follow.
        ends: which of the states configurations end with.
    """

    unit: Unit
    nodes: tuple[int, ...]
    narrow: bool
    sources: tuple[int, ...]
    copies: tuple[Copy, ...]
    first: int
    ends: tuple[End, ...]

    @property
    def slots(self) -> slice:
        """The slots that the unit is applied to."""
        return slice(self.first, self.first + len(self.nodes))


@dataclass(frozen=True)
class Schedule:
    """Every step of a sweep in order.

    Attributes:
        steps: all of them, by layer.
        slots: states that the buffer of all positions holds.
        narrow_slots: states that the buffer of scored positions holds.
        start: the configurations that end with the embeddings.
    """

    steps: tuple[Step, ...]
    slots: int
    narrow_slots: int
    start: tuple[int, ...]

    def by_layer(self) -> list[list[Step]]:
        """The steps of each layer that has any."""
        return [list(steps) for _, steps in groupby(self.steps, key=lambda step: step.unit.layer)]


@dataclass(frozen=True)
class Counts:
    """What a sweep costs for each batch of documents.

    Attributes:
        configurations: how many.
        attention_forwards: halves of layers computed, of the attention.
        mlp_forwards: halves of layers computed, of the MLP.
        own_forwards: whole layers computed by their own forward.
        head_forwards: different states that the head sees.
        kept_layers: forwards of a loop over the configurations with only their kept layers, a half counting half.
        all_layers: forwards of a loop that computes every layer and discards.
    """

    configurations: int
    attention_forwards: int
    mlp_forwards: int
    own_forwards: int
    head_forwards: int
    kept_layers: float
    all_layers: int

    @property
    def layer_forwards(self) -> float:
        """A half counts half."""
        return (self.attention_forwards + self.mlp_forwards) / 2 + self.own_forwards


def needed(layers: list[list[Step]]) -> list[tuple[int, set[Weights]]]:
    """The layers of `Schedule.by_layer` and whose weights each needs."""
    return [(steps[0].unit.layer, {step.unit.weights for step in steps}) for steps in layers]


def units(configuration: Configuration, own_forward: bool = False) -> list[Unit]:
    """What a configuration does to a state, in order.

    Args:
        configuration: its actions.
        own_forward: layers can only run whole; then no half of one may be skipped.
    """
    parts = _WHOLE if own_forward else _HALVES
    return [
        Unit(i, part, "base" if action == "revert" else "model")
        for i, action in enumerate(configuration.actions)
        for part in parts[action]
    ]


class Trie:
    """The states that configurations need, each once.

    Attributes:
        configurations: as given; they are distinct.
        nodes: parents before their children; the root is the first.
        last: for each configuration the node it ends with.
    """

    def __init__(self, configurations: Iterable[Configuration], own_forward: bool = False) -> None:
        """Build it.

        Args:
            configurations: distinct ones, of one number of layers.
            own_forward: layers can only run whole; then no half of one may be skipped.
        """
        self.configurations = tuple(configurations)
        self.nodes = [Node(None, -1)]
        self.last: list[int] = []
        children: dict[tuple[int, Unit], int] = {}
        for c, configuration in enumerate(self.configurations):
            at = 0
            for unit in units(configuration, own_forward):
                child = children.get((at, unit))
                if child is None:
                    child = children[at, unit] = len(self.nodes)
                    self.nodes[at].children.append(child)
                    self.nodes.append(Node(unit, at))
                at = child
            self.nodes[at].ends.append(c)
            self.last.append(at)
        for node in reversed(self.nodes):
            below = [self.nodes[child] for child in node.children]
            node.narrow = all(child.narrow and child.unit is not None and child.unit.part == "mlp" for child in below)

    def path(self, configuration: int) -> list[int]:
        """The nodes of a configuration from the first to its last, without the root."""
        path, at = [], self.last[configuration]
        while at:
            path.append(at)
            at = self.nodes[at].parent
        return path[::-1]

    def counts(self) -> Counts:
        """The cost of the sweep, and of loops without sharing."""
        parts = [node.unit.part for node in self.nodes if node.unit]
        cost = [0.0]  # of the way to each node
        for node in self.nodes[1:]:
            assert node.unit is not None
            cost.append(cost[node.parent] + _COST[node.unit.part])
        return Counts(
            configurations=len(self.last),
            attention_forwards=parts.count("attention"),
            mlp_forwards=parts.count("mlp"),
            own_forwards=parts.count("layer"),
            head_forwards=sum(bool(node.ends) for node in self.nodes),
            kept_layers=sum(cost[last] for last in self.last),
            all_layers=sum(len(configuration.actions) for configuration in self.configurations),
        )

    def steps(self) -> list[tuple[Unit, list[int]]]:
        """The units in the order they are applied, each with the nodes it makes."""
        made: dict[Unit, list[int]] = {}
        for n, node in enumerate(self.nodes):
            if node.unit:
                made.setdefault(node.unit, []).append(n)
        return sorted(made.items(), key=lambda item: (item[0].layer, _ORDER[item[0].part], item[0].weights))

    def schedule(self, narrow: bool) -> Schedule:
        """Where each state stands and when it is computed.

        Args:
            narrow: keep states behind which nothing attends only at scored positions.
        """
        return _Scheduler(self, narrow).run()


class _Scheduler:
    """Assigns slots. A state leaves its slot when its last child is computed, or at once where it has none."""

    def __init__(self, trie: Trie, narrow: bool) -> None:
        self._nodes = trie.nodes
        self._steps = trie.steps()
        self._narrow = [narrow and node.narrow for node in trie.nodes]
        self._waiting = [len(node.children) for node in trie.nodes]  # children not yet computed
        self._buffers: dict[bool, dict[int, int]] = {False: {}, True: {}}  # narrow -> slot -> node
        self._sizes = {False: 0, True: 0}

    def run(self) -> Schedule:
        root = self._nodes[0]
        if root.children:
            self._put(self._narrow[0], 0, 0)
        steps = [step for unit, made in self._steps for step in self._apply(unit, made)]
        return Schedule(tuple(steps), self._sizes[False], self._sizes[True], tuple(root.ends))

    def _apply(self, unit: Unit, made: list[int]) -> list[Step]:
        """Steps that leave the buffer of all positions come first: they read what the others overwrite."""
        leaving = [n for n in made if self._narrow[n] and not self._narrow[self._nodes[n].parent]]
        staying = [n for n in made if n not in set(leaving)]
        steps = [self._leave(unit, leaving)] if leaving else []
        for narrow in (True, False):
            group = [n for n in staying if self._narrow[n] == narrow]
            if group:
                steps.append(self._in_place(unit, group, narrow))
        return steps

    def _leave(self, unit: Unit, made: list[int]) -> Step:
        """From the buffer of all positions to new slots of the narrow one."""
        first = self._room(True, len(made))
        slots = {node: slot for slot, node in self._buffers[False].items()}
        sources = tuple(slots[self._nodes[n].parent] for n in made)
        for n in made:
            self._done(self._nodes[n].parent)
        return self._step(unit, made, True, sources, [], first)

    def _in_place(self, unit: Unit, made: list[int], narrow: bool) -> Step:
        buffer = self._buffers[narrow]
        slots = {node: slot for slot, node in buffer.items()}
        child = {self._nodes[n].parent: n for n in made}  # a parent has one child of a unit
        staying = {p for p in child if self._waiting[p] > 1}  # needed again: the child works on a copy
        movable = {slots[p] for p in child if p not in staying}
        first = self._window(len(made), movable, buffer)
        window = range(first, first + len(made))
        order: dict[int, int] = {slot: child[buffer[slot]] for slot in window if slot in movable}
        copies = []
        for slot in window:  # states at rest move out; where it is one that a child of this step comes from, the
            if slot in buffer and slot not in order:  # child takes its place
                at_rest = buffer.pop(slot)
                to = self._room(narrow, 1, window)
                buffer[to] = at_rest
                copies.append(Copy(slot, to))
                if at_rest in child:
                    order[slot] = child[at_rest]
                slots[at_rest] = to
        holes = iter([slot for slot in window if slot not in order])
        placed = set(order.values())
        for p, n in child.items():
            if n not in placed:
                hole = next(holes)
                copies.append(Copy(slots[p], hole))
                order[hole] = n
        for p in child:
            self._done(p)
        self._sizes[narrow] = max(self._sizes[narrow], window.stop)
        return self._step(unit, [order[slot] for slot in window], narrow, (), copies, first)

    def _step(
        self, unit: Unit, made: Sequence[int], narrow: bool, sources: tuple[int, ...], copies: list[Copy], first: int
    ) -> Step:
        ends = []
        for slot, n in enumerate(made, start=first):
            if self._nodes[n].ends:
                ends.append(End(slot, tuple(self._nodes[n].ends)))
            if self._nodes[n].children:
                self._put(narrow, slot, n)
        return Step(unit, tuple(made), narrow, sources, tuple(copies), first, tuple(ends))

    def _put(self, narrow: bool, slot: int, node: int) -> None:
        self._buffers[narrow][slot] = node
        self._sizes[narrow] = max(self._sizes[narrow], slot + 1)

    def _done(self, parent: int) -> None:
        """One child of it is computed."""
        self._waiting[parent] -= 1
        if not self._waiting[parent]:
            buffer = self._buffers[self._narrow[parent]]
            del buffer[next(slot for slot, node in buffer.items() if node == parent)]

    def _window(self, size: int, movable: set[int], taken: Iterable[int]) -> int:
        """The first slot of the run that already holds most of the states, and fewest at rest."""
        top = max(taken, default=-1) + 1
        at_rest = set(taken) - movable
        cost = [(slot in at_rest) - 2 * (slot in movable) for slot in range(top + size)]
        before = [0, *accumulate(cost)]
        return min(range(top + 1), key=lambda first: (before[first + size] - before[first], first))

    def _room(self, narrow: bool, size: int, avoid: range = range(0)) -> int:
        """The first of `size` free slots in a row outside `avoid`."""
        taken = self._buffers[narrow].keys() | set(avoid)
        first = next(f for f in range(len(taken) + max(taken, default=-1) + 2) if taken.isdisjoint(range(f, f + size)))
        self._sizes[narrow] = max(self._sizes[narrow], first + size)
        return first
