"""What every configuration writes against a model of its own that reads the whole sequence anew for each token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps.plain import greedy_tokens, plain_model
from tiny_models import FURTHER, VARIANTS, VOCABULARY, tiny_model

from cogsym.errors import CogsymError
from cogsym.sweeps.engine import generate as generating
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.generate import generate
from cogsym.sweeps.engine.requests import Generate
from cogsym.sweeps.engine.sampling import Sampling, Stops
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.actions import ACTIONS
from cogsym.sweeps.layers.configurations import Configuration, distinct, grid
from cogsym.sweeps.layers.trie import Trie

L, END = 4, 3


class Numbers:
    """A tokenizer whose text is the ids, each closed by a comma."""

    def decode(self, ids, skip_special_tokens=True):
        assert skip_special_tokens
        return "".join(f"{i}," for i in ids)


def prompts(seed: int, stops: tuple[str, ...] = ()) -> list[Generate]:
    """Three that begin alike, one by itself, of different lengths and limits."""
    chance = random.Random(seed)

    def tokens(number):
        return tuple(chance.randrange(VOCABULARY) for _ in range(number))

    header = tokens(chance.randint(8, 12))
    return [*(Generate(header + tokens(n), 7, stops) for n in (1, 4, 4)), Generate(tokens(9), 4, stops)]


def chosen(seed: int, number: int = 12) -> list[Configuration]:
    chance = random.Random(seed)
    some = [Configuration(tuple(chance.choice(tuple(ACTIONS)) for _ in range(L))) for _ in range(number)]
    return distinct([Configuration(("keep",) * L), Configuration(("skip",) * L), *some])[0]


def written(model, configurations, asked, base=None, sampling=None):
    layers = ResidentLayers(model, base)
    try:
        engine, stops = Engine(layers), Stops(Numbers(), [END])
        return generate(engine, SweepHead(model), Trie(configurations, engine.topology), asked, stops, sampling)
    finally:
        layers.close()


def check(got, model, configurations, asked, base):
    for configuration, answers in zip(configurations, got, strict=True):
        plain = plain_model(model, configuration, base)
        for request, answer in zip(asked, answers, strict=True):
            expected = greedy_tokens(plain, request.tokens, request.max_new_tokens, END)
            assert answer.num_tokens == len(expected), configuration.code
            assert answer.text == Numbers().decode([i for i in expected if i != END])
            assert answer.ended == ("stop" if expected[-1] == END else "length")


@pytest.mark.parametrize("variant", VARIANTS | FURTHER)
def test_tokens_are_those_of_models_without_the_layers(variant):
    model, base, asked = tiny_model(variant), tiny_model(variant, seed=1), prompts(0)
    configurations = chosen(1)
    if variant in FURTHER:
        asked, configurations = asked[2:], configurations[:4]
    check(written(model, configurations, asked, base), model, configurations, asked, base)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(tuple(ACTIONS)), min_size=L, max_size=L).map(tuple),
        min_size=1,
        max_size=5,
        unique=True,
    ),
    st.integers(0, 2**32),
)
def test_any_set_of_configurations(actions, seed):
    model, base = tiny_model("mistral-window"), tiny_model("mistral-window", seed=1)
    configurations, asked = [Configuration(each) for each in actions], prompts(seed)[1:]
    check(written(model, configurations, asked, base), model, configurations, asked, base)


def test_a_stop_ends_the_text_before_it():
    model, configurations = tiny_model("llama"), chosen(2)
    free = written(model, configurations, prompts(4), model)
    stop = free[0][0].text.split(",")[2] + ","
    for unstopped, stopped in zip(free, written(model, configurations, prompts(4, (stop,)), model), strict=True):
        for before, after in zip(unstopped, stopped, strict=True):
            at = before.text.find(stop)
            assert after.text == (before.text if at < 0 else before.text[:at])
            assert after.ended == (before.ended if at < 0 else "stop")


def test_rows_with_equal_histories_are_computed_once():
    """A whole sweep of configurations that change nothing behind layer 0 writes the same, and costs as one."""
    model = tiny_model("llama")
    for attention in (module.self_attn for module in model.model.layers):
        torch.nn.init.zeros_(attention.o_proj.weight)
    for module in model.model.layers:
        torch.nn.init.zeros_(module.mlp.down_proj.weight)
    asked = prompts(0)[:1]
    configurations, _ = distinct(grid(L))
    layers, trie = ResidentLayers(model), Trie(configurations)
    engine, seen = Engine(layers), []
    engine.on_forwards = seen.append
    got = generate(engine, SweepHead(model), trie, asked, Stops(Numbers(), []))
    layers.close()
    assert len({answers[0].text for answers in got}) == 1
    # One pass over the prompt, and six tokens behind the first one written.
    assert sum(seen) == trie.counts().layer_forwards * 7


def test_finished_rows_leave():
    """Two prompts under the whole model: each token behind the first costs one pass of those that still write."""
    model, limits = tiny_model("llama"), (2, 5)
    asked = [Generate(tuple(range(n, n + 9)), limit) for n, limit in zip((0, 20), limits, strict=True)]
    layers, trie = ResidentLayers(model), Trie([Configuration(("keep",) * L)])
    engine, seen = Engine(layers), []
    engine.on_forwards = seen.append
    generate(engine, SweepHead(model), trie, asked, Stops(Numbers(), []))
    layers.close()
    assert sum(seen) == L * (1 + sum(limit - 1 for limit in limits))


def test_sampling_does_not_depend_on_the_neighbours():
    model, asked, configurations = tiny_model("llama", torch.float64), prompts(6), chosen(7)
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=5)
    together = written(model, configurations, asked, model, sampling)
    assert len({answers[0].text for answers in together}) > len(configurations) // 2
    for c in (0, 3, 7):
        for r in (0, 2):
            assert written(model, [configurations[c]], [asked[r]], model, sampling) == [[together[c][r]]]
    assert written(model, configurations, asked, model, Sampling(1.3, 0.9, seed=6)) != together


def test_sampling_draws_from_the_distribution():
    torch.manual_seed(0)
    logits, draws = torch.randn(9), 20_000
    chance = torch.from_numpy(np.random.default_rng(0).random(draws))
    for sampling in (Sampling(0.7), Sampling(1.0, top_p=0.8)):
        p, order = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True)
        p[p.cumsum(-1) - p >= sampling.top_p] = 0
        expected = torch.zeros_like(p).index_put((order,), p / p.sum())
        tokens = sampling.choose(logits.expand(draws, -1), chance)
        share = torch.bincount(tokens, minlength=9) / draws
        assert (share - expected).abs().max() < 4 * (expected * (1 - expected) / draws).sqrt().max()
        assert (share[expected == 0] == 0).all() and (expected > 0).sum() > 2


def test_a_low_temperature_is_greedy():
    model, asked, configurations = tiny_model("llama"), prompts(1), chosen(1, 4)
    greedy = written(model, configurations, asked, model)
    assert written(model, configurations, asked, model, Sampling(temperature=1e-5)) == greedy


def test_no_buffer_is_read_before_it_is_written(monkeypatch):
    model, asked, configurations = tiny_model("llama"), prompts(2), chosen(3)
    expected = written(model, configurations, asked, model)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        return new_empty(self, *size, **options).fill_(torch.nan if self.is_floating_point() else -(1 << 40))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert written(model, configurations, asked, model) == expected


def test_rows_of_tokens_drawn_by_chance_are_cut_in_pieces(monkeypatch):
    model, asked, configurations = tiny_model("llama", torch.float64), prompts(2), chosen(3)
    expected = written(model, configurations, asked, model, Sampling(1.0))
    monkeypatch.setattr(generating, "_HEAD_ROWS", 3)
    assert written(model, configurations, asked, model, Sampling(1.0)) == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_impossible_sampling_is_refused(temperature, top_p):
    with pytest.raises(CogsymError, match="expected"):
        Sampling(temperature, top_p)
