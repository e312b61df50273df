"""In which order the states of a trie are computed, and where each stands.

The nodes are computed layer by layer, so that a layer's weights are read once for all of them. States stand in numbered
slots of one buffer, and a step applies one unit in place to a contiguous run of slots: a slice, never a gather. Where a
state is needed again later its child works on a copy, and where a state at rest lies in the run it is moved out.

States behind which nothing attends any more are narrow: they exist only at the positions that are scored. Their last
unit that attends computes keys and values everywhere, and queries, output and MLP only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from cogsym.sweeps.layers.actions import Weights
from cogsym.sweeps.layers.trie import Trie, Unit


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


def needed(layers: list[list[Step]]) -> list[tuple[int, set[Weights]]]:
    """The layers of `Schedule.by_layer` and whose weights each needs."""
    return [(steps[0].unit.layer, {step.unit.weights for step in steps}) for steps in layers]


def schedule(trie: Trie, narrow: bool) -> Schedule:
    """Where each state stands and when it is computed.

    Args:
        trie: the states.
        narrow: keep states behind which nothing attends only at scored positions.
    """
    return _Scheduler(trie, narrow).run()


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
