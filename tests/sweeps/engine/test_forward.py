"""Scores of every configuration against a model of its own with those layers removed."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps.plain import all_log_probabilities, log_probabilities, plain_model
from tiny_models import FURTHER, PARTLY_OWN, VARIANTS, VOCABULARY, exact_float64, tiny_model

from cogsym.sweeps.engine import forward as engine
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.requests import Score
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.actions import ACTIONS
from cogsym.sweeps.layers.configurations import Configuration, distinct, grid
from cogsym.sweeps.layers.trie import Trie

L = 4
WHOLE = tuple(name for name in ACTIONS if ACTIONS[name].whole)  # what layers that only run whole can take
# Made once for the hundreds of sets that are tried.
LLAMAS = cache(lambda seed: tiny_model("llama", seed=seed))
PLAIN = cache(plain_model)


def requests(seed: int) -> list[Score]:
    """Three options of one question, two sequences by themselves, one of them scored throughout."""
    chance = random.Random(seed)

    def tokens(number):
        return tuple(chance.randrange(VOCABULARY) for _ in range(number))

    question = tokens(chance.randint(8, 14))
    options = [Score(question + tokens(n), len(question)) for n in (1, 5, 3)]
    return [*options, Score(tokens(11), 1), Score(tokens(6), 4)]


def swept(model, configurations, asked, base=None):
    layers = ResidentLayers(model, base)
    try:
        engine = Engine(layers)
        return score(engine, SweepHead(model), Trie(configurations, engine.topology), asked)
    finally:
        layers.close()


def chosen(seed: int, number: int = 14, actions: tuple[str, ...] = tuple(ACTIONS)) -> list[Configuration]:
    chance = random.Random(seed)
    some = [Configuration(tuple(chance.choice(actions) for _ in range(L))) for _ in range(number)]
    return distinct([Configuration(("keep",) * L), Configuration(("skip",) * L), *some])[0]


def largest_error(got, model, configurations, asked, base, plain_one=plain_model):
    """Of a token's log-probability, every answer's likeliest tokens being the right ones."""
    errors = []
    for configuration, answers in zip(configurations, got, strict=True):
        plain = plain_one(model, configuration, base)
        for request, answer in zip(asked, answers, strict=True):
            told = all_log_probabilities(plain, request.tokens)[request.first - 1 :]
            targets = torch.tensor(request.tokens[request.first :])
            expected = told.gather(-1, targets[:, None]).sum().item()
            assert answer.num_tokens == len(targets)
            assert answer.greedy == torch.equal(told.argmax(-1), targets)
            errors.append((abs(answer.log_likelihood - expected) / len(targets), configuration.code))
    return max(errors)


def check(got, model, configurations, asked, base, tolerance, plain_one=plain_model):
    error, code = largest_error(got, model, configurations, asked, base, plain_one)
    assert error <= tolerance, code


def float64_error(variant):
    """`largest_error` in float64."""
    model, base = (tiny_model(variant, torch.float64, seed) for seed in (0, 1))
    asked, configurations = requests(8), chosen(9, actions=WHOLE if variant in PARTLY_OWN else tuple(ACTIONS))
    with torch.no_grad(), exact_float64():
        return largest_error(swept(model, configurations, asked, base), model, configurations, asked, base)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_models_without_the_layers(variant):
    model, base, asked = tiny_model(variant), tiny_model(variant, seed=1), requests(3)
    configurations = chosen(5)
    with torch.no_grad():
        check(swept(model, configurations, asked, base), model, configurations, asked, base, 2e-6)


@pytest.mark.parametrize(
    "variant", ["llama", "gemma2", "olmo2", "granite", "qwen3-windows-biases", *FURTHER, *PARTLY_OWN]
)
def test_scores_are_exact_in_float64(variant):
    assert float64_error(variant) < 1e-12


@settings(max_examples=300, deadline=None)
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
    model, base = (LLAMAS(seed) for seed in (0, 1))
    configurations, asked = [Configuration(each) for each in actions], requests(seed)[1:4]
    with torch.no_grad():
        check(swept(model, configurations, asked, base), model, configurations, asked, base, 2e-6, PLAIN)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "phi3"])
def test_bfloat16_is_no_further_from_the_truth_than_transformers(variant):
    exact, asked, configurations = tiny_model(variant, torch.float64), requests(1), grid(L)
    model = tiny_model(variant, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    configurations, _ = distinct(configurations)
    ours, theirs = [], []
    with exact_float64():
        truth = [[log_probabilities(plain_model(exact, c), r.tokens) for r in asked] for c in configurations]
    for c, answers in enumerate(swept(model, configurations, asked)):
        plain = plain_model(model, configurations[c])
        for r, answer in enumerate(answers):
            scored = slice(asked[r].first - 1, None)
            expected = truth[c][r][scored].sum().item()
            ours.append(answer.log_likelihood - expected)
            theirs.append(log_probabilities(plain, asked[r].tokens)[scored].sum().item() - expected)
    assert torch.tensor(ours).norm() <= 2 * torch.tensor(theirs).norm()


def test_no_buffer_is_read_before_it_is_written(monkeypatch):
    model, asked, configurations = tiny_model("llama"), requests(2), chosen(3)
    expected = swept(model, configurations, asked, model)
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        return new_empty(self, *size, **options).fill_(torch.nan if self.is_floating_point() else -(1 << 40))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert swept(model, configurations, asked, model) == expected


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "gemma2"])
def test_attention_row_by_row_is_the_same(monkeypatch, variant):
    """The way of a device that has no kernel on tiles for packed sequences."""
    model, asked, configurations = tiny_model(variant), requests(4), chosen(6)
    monkeypatch.setattr(engine, "_on_tiles", lambda half, q: False)
    with torch.no_grad():
        check(swept(model, configurations, asked, model), model, configurations, asked, model, 2e-6)


def test_every_state_is_computed_once():
    """Layer-forwards as they happen are those of the plan, for options that share, narrow states and all."""
    model = tiny_model("llama")
    for configurations in (distinct(grid(L))[0], chosen(4)):
        layers, trie = ResidentLayers(model, model), Trie(configurations)
        engine, seen = Engine(layers), []
        engine.on_forwards = seen.append
        score(engine, SweepHead(model), trie, requests(0))
        layers.close()
        assert sum(seen) == trie.counts().layer_forwards


def test_flops_are_those_of_the_plan():
    """Products of a grid of full states: layers by the trie, heads at scored positions only."""
    from torch.utils.flop_counter import FlopCounterMode

    model, configurations = tiny_model("llama"), distinct(grid(L))[0]
    asked = [Score(tuple(range(10)), 1), Score(tuple(range(20, 33)), 1)]
    layers, trie = ResidentLayers(model), Trie(configurations)
    with FlopCounterMode(display=False) as counter:
        score(Engine(layers), SweepHead(model), trie, asked)
    layers.close()
    D, F, heads, groups, d = 36, 52, 6, 2, 10
    tokens = 9 + 12
    layer = 2 * tokens * (D * (heads + 2 * groups) * d + heads * d * D + 3 * D * F)
    told = counter.get_flop_counts()["Global"]
    products = sum(told.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.cogsym.linear))
    head = 2 * tokens * D * VOCABULARY * trie.counts().head_forwards
    # The head's operation counts its product under its own name.
    assert products == trie.counts().layer_forwards * layer
    assert told[torch.ops.cogsym.token_scores] == head


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    swept(model, chosen(0), requests(0), model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, (_, tensor) in before.items())
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    storages = {t.untyped_storage().data_ptr() for t in after.values()}
    assert len(storages) == len({t.data_ptr() for t in after.values()})
