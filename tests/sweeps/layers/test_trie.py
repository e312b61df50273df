"""The trie's counts against closed formulas, and its schedule against running every configuration by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogsym.errors import CogsymError
from cogsym.sweeps.layers.actions import ACTIONS, Action
from cogsym.sweeps.layers.configurations import (
    Configuration,
    blocks,
    distinct,
    grid,
    input_direction,
    output_direction,
    single,
)
from cogsym.sweeps.layers.schedule import Schedule, schedule
from cogsym.sweeps.layers.trie import Trie, Unit, units

LENGTHS = range(1, 81)


def counts(configurations):
    return Trie(distinct(configurations)[0]).counts()


@pytest.mark.parametrize("L", LENGTHS)
def test_directions_cost_what_design_says(L):
    triangle = L * (L + 1) // 2
    for name, chosen, configurations, loop, forwards in (
        ("input", input_direction(L), L + 1, triangle, triangle),
        ("output", output_direction(L), L + 1, triangle, L),
        ("single", single(L), L + 1, L * L, L + L * (L - 1) // 2),
    ):
        told = counts(chosen)
        assert (told.configurations, told.kept_layers, told.layer_forwards) == (configurations, loop, forwards), name
        assert told.attention_forwards == told.mlp_forwards == forwards and told.whole_forwards == 0
        assert told.all_layers == L * configurations and told.head_forwards == configurations


@pytest.mark.parametrize("L", LENGTHS)
def test_a_grid_costs_as_much_as_the_input_direction(L):
    chosen, merged = distinct(grid(L))
    told = Trie(chosen).counts()
    assert merged == L and told.configurations == (L + 1) * (L + 2) // 2 - L
    assert told.layer_forwards == L * (L + 1) // 2
    # Each interval of n kept layers, there are L - n + 1.
    assert told.kept_layers == sum(n * (L - n + 1) for n in range(1, L + 1))
    assert told.head_forwards == told.configurations


@pytest.mark.parametrize("L", [*range(1, 33), 48, 80])
def test_blocks_cost_their_ends(L):
    told = counts(blocks(L))
    # The whole model, and behind each block (i..j) the layers after j, which depend on i and j.
    forwards = L + sum((j + 1) * (L - 1 - j) for j in range(L))
    assert told.layer_forwards == forwards
    assert told.kept_layers == L + sum(L - n for n in range(1, L + 1) for _ in range(L - n + 1))


def test_the_table_of_32_layers():
    table = {
        "input": (input_direction(32), 33, 1056, 528, 528),
        "output": (output_direction(32), 33, 1056, 528, 32),
        "grid": (grid(32), 529, 16928, 5984, 528),
        "single": (single(32), 33, 1056, 1024, 528),
        "blocks": (blocks(32), 529, 16928, 10944, 5488),
    }
    assert len(grid(32)) == 561
    for name, (chosen, *expected) in table.items():
        told = counts(chosen)
        got = [told.configurations, told.all_layers, told.kept_layers, told.layer_forwards]
        assert got == expected, name


def test_input_output_and_grid_of_30_layers_are_466():
    chosen, merged = distinct([*input_direction(30), *output_direction(30), *grid(30)])
    assert len(chosen) == 466 and merged == 31 + 31 + 496 - 466


@pytest.mark.parametrize("L", [2, 30, 32])
@pytest.mark.parametrize("make", [input_direction, output_direction, grid, single, blocks])
def test_only_states_that_begin_are_copied(make, L):
    """A new state costs one copy; none is ever moved to make a slice."""
    trie = Trie(distinct(make(L))[0])
    branches = sum(max(0, len(node.children) - 1) for node in trie.nodes)
    assert sum(len(step.copies) for step in schedule(trie, narrow=False).steps) == branches


@pytest.mark.parametrize(("make", "slots"), [(input_direction, 30), (output_direction, 1), (grid, 30), (single, 30)])
def test_live_states(make, slots):
    assert schedule(Trie(distinct(make(30))[0]), narrow=False).slots == slots


def run(schedule: Schedule, trie: Trie) -> dict[int, list[Unit]]:
    """What each configuration's last state has been through; states are lists of units."""
    full: list[list[Unit] | None] = [None] * schedule.slots
    narrow: list[list[Unit] | None] = [None] * schedule.narrow_slots
    ended = {c: [] for c in schedule.start}
    if full:
        full[0] = []
    elif narrow:
        narrow[0] = []
    for step in schedule.steps:
        buffer = narrow if step.narrow else full
        for copy in step.copies:
            buffer[copy.target] = buffer[copy.source]
        slots = range(step.slots.start, step.slots.stop)
        if step.sources:
            before = [full[source] for source in step.sources]
        else:
            # The last unit of a state that attends needs all positions.
            assert not (step.narrow and step.unit.attends)
            before = [buffer[slot] for slot in slots]
        for slot, state, node in zip(slots, before, step.nodes, strict=True):
            assert state is not None and trie.nodes[node].unit == step.unit
            buffer[slot] = [*state, step.unit]
        for end in step.ends:
            for c in end.configurations:
                assert c not in ended
                ended[c] = buffer[end.slot]
    return ended


def configurations_of(actions, most):
    return st.integers(1, most).flatmap(
        lambda L: st.lists(st.lists(st.sampled_from(actions), min_size=L, max_size=L).map(tuple), min_size=1)
    )


@settings(max_examples=300, deadline=None)
@given(configurations_of(tuple(ACTIONS), 6), st.booleans(), st.sampled_from(("sequential", "parallel")))
def test_every_configuration_goes_through_its_own_units(actions, narrow, topology):
    chosen, _ = distinct(map(Configuration, actions))
    trie = Trie(chosen, topology)
    ended = run(schedule(trie, narrow), trie)
    assert ended == {c: units(configuration, topology) for c, configuration in enumerate(chosen)}


@settings(max_examples=100, deadline=None)
@given(configurations_of(("keep", "skip", "revert"), 4))
def test_whole_layers_are_units_too(actions):
    chosen, _ = distinct(map(Configuration, actions))
    trie = Trie(chosen, "whole")
    assert run(schedule(trie, narrow=False), trie) == {c: units(each, "whole") for c, each in enumerate(chosen)}
    assert trie.counts().layer_forwards == trie.counts().whole_forwards == len(trie.nodes) - 1


def test_units_of_each_topology():
    every = Configuration(("keep", "skip", "skip_attention", "skip_mlp", "revert"))
    attention, mlp, layer = "attention", "mlp", "layer"
    assert units(every) == [
        (0, attention, "model"), (0, mlp, "model"), (2, mlp, "model"), (3, attention, "model"), (4, attention, "base"),
        (4, mlp, "base"),
    ]  # fmt: skip
    halves = [(2, mlp, "model"), (3, attention, "model")]
    assert units(every, "parallel") == [(0, layer, "model"), *halves, (4, layer, "base")]
    whole = Configuration(("keep", "skip", "revert"))
    assert units(whole, "whole") == [(0, layer, "model"), (2, layer, "base")]
    with pytest.raises(CogsymError, match="skip_attention treats the halves of layer 2 differently"):
        units(every, "whole")


def test_halves_of_two_checkpoints(monkeypatch):
    """Possible one after the other, and not from one norm."""
    monkeypatch.setitem(ACTIONS._objects, "revert_mlp", Action("p", "model", "base", "with the base's MLP"))
    mixed = Configuration(("revert_mlp",))
    assert units(mixed) == [(0, "attention", "model"), (0, "mlp", "base")]
    with pytest.raises(CogsymError, match="halves of layer 0 from two checkpoints"):
        units(mixed, "parallel")


@pytest.mark.parametrize("L", [1, 2, 7, 32])
@pytest.mark.parametrize("make", [input_direction, output_direction, grid, single, blocks])
def test_parallel_layers_cost_what_sequential_ones_do(make, L):
    """Whole layers are one unit for two; of halves only those are shared that the same state is read by."""
    chosen = distinct(make(L))[0]
    sequential, parallel = Trie(chosen).counts(), Trie(chosen, "parallel").counts()
    assert parallel.layer_forwards == sequential.layer_forwards == parallel.whole_forwards
    assert (parallel.kept_layers, parallel.head_forwards) == (sequential.kept_layers, sequential.head_forwards)
    # After layer 0 without one half: with the other, then behind it the L - 1 others.
    half = Trie([Configuration.of(L, {}), Configuration.of(L, {"skip_mlp": [0]})], "parallel").counts()
    assert (half.whole_forwards, half.attention_forwards, half.mlp_forwards) == (L + L - 1, 1, 0)
    # In a sequential layer the attention is shared, and only its end is another state.
    both = Trie([Configuration.of(L, {}), Configuration.of(L, {"skip_mlp": [0]})]).counts()
    assert (both.attention_forwards, both.mlp_forwards) == (L + L - 1, L + L - 1)


@pytest.mark.parametrize("topology", ["sequential", "parallel"])
def test_the_last_layer_is_narrow(topology):
    """Its last unit that attends leaves the buffer of all positions, and what follows is at scored positions only."""
    trie = Trie([Configuration.of(3, {}), Configuration.of(3, {"skip_attention": [2]})], topology)
    order = schedule(trie, narrow=True)
    last = [step for step in order.steps if step.unit.layer == 2]
    assert all(step.narrow for step in last) and not any(step.narrow for step in order.steps if step not in last)
    leaving = [(step.unit.part, len(step.nodes)) for step in last if step.sources]
    staying = [(step.unit.part, len(step.nodes)) for step in last if not step.sources]
    if topology == "parallel":
        assert leaving == [("layer", 1), ("mlp", 1)] and staying == []
        assert (order.slots, order.narrow_slots) == (1, 1)
    else:
        assert leaving == [("attention", 1), ("mlp", 1)] and staying == [("mlp", 1)]
        assert (order.slots, order.narrow_slots) == (1, 2)


def test_steps_that_leave_the_buffer_are_few_where_few_states_end():
    """Of a grid only the states of the last layer are narrow."""
    trie = Trie(distinct(grid(12))[0])
    narrow = [step for step in schedule(trie, narrow=True).steps if step.narrow]
    assert {step.unit.layer for step in narrow} == {11}
    assert [len(step.nodes) for step in narrow] == [12, 12]
