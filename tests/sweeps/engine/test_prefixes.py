"""Sequences laid out in one row: every token sees what it would see by itself, and shared beginnings are there once."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cogsym.sweeps.engine.prefixes import SHORTEST_SHARED, pack_prefixes


def seen(begins, ends):
    return [sorted(t for a, b in zip(*row, strict=True) for t in range(a, b)) for row in zip(begins, ends, strict=True)]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 1, 3, 7]))
def test_every_token_sees_its_sequence_up_to_itself(seed, window):
    chance = random.Random(seed)
    beginnings = [[chance.randrange(3) for _ in range(chance.randint(1, 30))] for _ in range(3)]
    sequences = []
    for _ in range(chance.randint(1, 8)):
        kept = chance.choice(beginnings)[: chance.randint(0, 30)]
        sequences.append(tuple(kept + [chance.randrange(3) for _ in range(chance.randint(not kept, 6))]))
    layout = pack_prefixes(sequences)
    roots = len(layout.starts)
    begins, ends = (x.tolist() for x in layout.ranges(window))
    for sequence, places in zip(sequences, layout.places, strict=True):
        assert tuple(layout.tokens[places].tolist()) == sequence
        assert layout.positions[places].tolist() == list(range(len(sequence)))
        expected = [sorted(places[: i + 1].tolist()[-(window or 99) :]) for i in range(len(sequence))]
        assert seen(*(x.tolist() for x in layout.ranges_at(places, window))) == expected
        for place, allowed in zip(places.tolist(), expected, strict=True):
            if place >= roots:
                assert seen([begins[place - roots]], [ends[place - roots]]) == [allowed]
            elif window is None:
                assert list(range(layout.starts[place], place + 1)) == allowed


def test_options_share_their_question():
    question = tuple(range(100, 100 + SHORTEST_SHARED))
    layout = pack_prefixes([(*question, 1, 2), (*question, 3), (*question, 1, 4)])
    assert len(layout.tokens) == len(question) + 2 + 1 + 2
    assert len(layout.starts) == len(question)


def test_examples_before_questions_are_shared_and_so_are_the_questions():
    header, one, other = tuple(range(20)), tuple(range(30, 40)), tuple(range(50, 62))
    layout = pack_prefixes([(*header, *one, 1), (*header, *one, 2), (*header, *other, 1), (*header, *other, 3)])
    assert len(layout.tokens) == 20 + 10 + 12 + 4
    assert layout.chains.shape[1] == 3


def test_a_short_common_beginning_is_not_worth_it():
    layout = pack_prefixes([(0, 1, 2), (0, 3, 4, 5)])
    assert len(layout.starts) == len(layout.tokens) == 7


def test_equal_sequences_are_there_once():
    layout = pack_prefixes([(5, 6), (5, 6), (7,)])
    assert len(layout.tokens) == 3
    assert layout.places[0].tolist() == layout.places[1].tolist()
