"""The trie's counts against closed formulas, and its schedule against running every configuration by itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogsym.sweeps.layers.configurations import (
    ACTIONS,
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
        assert told.attention_forwards == told.mlp_forwards == forwards and told.own_forwards == 0
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
            # The last attention of a state needs all positions.
            assert not (step.narrow and step.unit.part == "attention")
            before = [buffer[slot] for slot in slots]
        for slot, state, node in zip(slots, before, step.nodes, strict=True):
            assert state is not None and trie.nodes[node].unit == step.unit
            buffer[slot] = [*state, step.unit]
        for end in step.ends:
            for c in end.configurations:
                assert c not in ended
                ended[c] = buffer[end.slot]
    return ended


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda L: st.lists(
            st.lists(st.sampled_from(ACTIONS), min_size=L, max_size=L).map(tuple), min_size=1, max_size=30
        )
    ),
    st.booleans(),
)
def test_every_configuration_goes_through_its_own_units(actions, narrow):
    chosen, _ = distinct(map(Configuration, actions))
    trie = Trie(chosen)
    ended = run(schedule(trie, narrow), trie)
    assert ended == {c: units(configuration) for c, configuration in enumerate(chosen)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(("keep", "skip", "revert")), min_size=4, max_size=4).map(tuple), min_size=1))
def test_whole_layers_are_units_too(actions):
    chosen, _ = distinct(map(Configuration, actions))
    trie = Trie(chosen, own_forward=True)
    assert run(schedule(trie, narrow=False), trie) == {c: units(each, True) for c, each in enumerate(chosen)}
    assert trie.counts().layer_forwards == trie.counts().own_forwards == len(trie.nodes) - 1


def test_steps_that_leave_the_buffer_are_few_where_few_states_end():
    """Of a grid only the states of the last layer are narrow."""
    trie = Trie(distinct(grid(12))[0])
    narrow = [step for step in schedule(trie, narrow=True).steps if step.narrow]
    assert {step.unit.layer for step in narrow} == {11}
    assert [len(step.nodes) for step in narrow] == [12, 12]
