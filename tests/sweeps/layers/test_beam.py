"""Beam search: what it finds, and what its rounds cost."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogsym.errors import CogsymError
from cogsym.sweeps.layers.beam import BeamSearch
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.search import SEARCHES, Search, SearchSettings, register_search
from cogsym.sweeps.layers.trie import Trie


class Values:
    """A value for each configuration, drawn when it is asked for; some are the same, some are missing."""

    def __init__(self, seed: int, missing: float = 0.0) -> None:
        self.seed, self.missing = seed, missing
        self.rounds: list[list[str]] = []
        self.reports: list[tuple[str, float]] = []

    def __getitem__(self, code: str) -> float:
        chance = random.Random(f"{self.seed} {code}")
        return math.nan if chance.random() < self.missing else float(chance.randrange(8))

    def ask(self, configurations: list[Configuration]) -> Values:
        codes = [c.code for c in configurations]
        assert len(codes) == len(set(codes))
        self.rounds.append(codes)
        return self

    def report(self, words: str, value: float) -> None:
        self.reports.append((words, value))


def greedy(num_layers: int, remove: int, values: Values, higher: bool) -> list[int]:
    """The layers that go, one after the other, without the toolkit."""
    gone: list[int] = []
    for _ in range(remove):

        def loss(i: int) -> tuple[bool, float]:
            value = values["".join("s" if j in (*gone, i) else "." for j in range(num_layers))]
            return math.isnan(value), -value if higher else value

        gone.append(min((i for i in range(num_layers) if i not in gone), key=loss))
    return gone


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 7), st.data(), st.integers(0, 10**6), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]))
def test_width_1_is_greedy(num_layers: int, data: st.DataObject, seed: int, higher: bool, missing: float) -> None:
    remove = data.draw(st.integers(1, num_layers))
    expected = greedy(num_layers, remove, Values(seed, missing), higher)
    told = []
    for name, width in (("greedy", None), ("greedy", 1), ("beam", 1)):
        values = Values(seed, missing)
        found = SEARCHES[name](SearchSettings(num_layers, "skip", remove, width)).run(values.ask, higher, values.report)
        assert found == Configuration.of(num_layers, {"skip": expected})
        assert [words for words, _ in values.reports] == [f"layer {i} goes" for i in expected]
        told.append(values.rounds)
    assert told[0] == told[1] == told[2] and told[0][0][0] == "." * num_layers


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.data(), st.integers(0, 10**6), st.booleans())
def test_a_wide_beam_finds_the_best_of_all(num_layers: int, data: st.DataObject, seed: int, higher: bool) -> None:
    remove, values = data.draw(st.integers(1, num_layers)), Values(seed)
    search = BeamSearch(num_layers, "skip", remove, width=20)  # as many as there are sets of three of six
    found = search.run(values.ask, higher, values.report)
    every = [Configuration.of(num_layers, {"skip": gone}) for gone in combinations(range(num_layers), remove)]
    assert values[found.code] == (max if higher else min)(values[c.code] for c in every)
    assert found.k == remove and set(values.rounds[-1]) - {"." * num_layers} == {c.code for c in every}


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 7), st.data(), st.sampled_from(["skip", "skip_attention", "skip_mlp", "revert"]))
def test_what_a_round_costs(num_layers: int, data: st.DataObject, action: str) -> None:
    """One set of R layers left takes (R - 1)(R + 2) / 2 forwards, W sets no more than W times as many."""
    number = data.draw(st.integers(0, num_layers - 1))
    sets = st.sets(st.integers(0, num_layers - 1), min_size=number, max_size=number).map(frozenset)
    beam = data.draw(st.sets(sets, min_size=1, max_size=5))
    search = BeamSearch(num_layers, action, num_layers, width=len(beam))
    asked = list(search.candidates(beam).values())
    forwards = Trie(asked).counts().layer_forwards
    planned = list(search.planned())[number]
    if not number:
        assert planned.configurations == [Configuration.of(num_layers, {}), *asked]
    bound = Trie(planned.configurations).counts().layer_forwards
    assert planned.times == min(len(beam), math.comb(num_layers, number)) >= len(beam)
    assert forwards <= planned.times * bound and len(asked) <= planned.times * len(planned.configurations)
    if action == "skip":
        left = num_layers - number
        assert bound == (left - 1) * (left + 2) / 2 + (number == 0)  # with the whole model one layer more
        if len(beam) == 1 and number:
            assert forwards == bound


def test_what_cannot_be_is_refused() -> None:
    for settings_, message in (
        (SearchSettings(4, "skip", 5), "The search is to remove 5 layers, expected 1 to 4; the model has 4."),
        (SearchSettings(4, "skip", 0), "The search is to remove 0 layers, expected 1 to 4"),
        (SearchSettings(4, "skip", 2, 0), "The width of the search is 0, expected 1 set of layers or more."),
    ):
        with pytest.raises(CogsymError) as caught:
            SEARCHES["beam"](settings_)
        assert message in str(caught.value)
    with pytest.raises(CogsymError, match="width is 2 and the search greedy follows one set of layers"):
        SEARCHES["greedy"](SearchSettings(4, "skip", 2, 2))
    with pytest.raises(CogsymError, match="search 'beam' is registered already"):
        register_search("beam", SEARCHES["beam"])


def test_unless_told_half_of_the_layers_go_and_four_sets_are_followed() -> None:
    search: Search = SEARCHES["beam"](SearchSettings(9, "skip"))
    assert search == BeamSearch(9, "skip", remove=4, width=4)
    assert SEARCHES["greedy"](SearchSettings(9, "skip")) == BeamSearch(9, "skip", remove=4, width=1)
