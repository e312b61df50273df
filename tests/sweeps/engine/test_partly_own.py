"""Sweeps of layers of which a half runs its own forward: experts beside our attention, linear attention among ours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from sweeps.engine import test_forward, test_generate
from sweeps.engine.test_generate import END, Numbers, prompts
from sweeps.plain import greedy_tokens, plain_model
from tiny_models import PARTLY_OWN, exact_float64, tiny_model

import cogsym
from cogsym.models.loading import load_tokenizer
from cogsym.sweeps.engine.fallback import generate_fallback
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.sampling import Sampling, Stops
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration, distinct
from cogsym.sweeps.layers.trie import Trie

HYBRIDS = tuple(name for name, (_, extra) in PARTLY_OWN.items() if "linear_num_key_heads" in extra)
ROUTED = tuple(name for name, (_, extra) in PARTLY_OWN.items() if "num_experts" in extra and name not in HYBRIDS)
ALONE = tuple(name for name in PARTLY_OWN if name not in HYBRIDS + ROUTED)  # attention by its own forward in all layers


@pytest.mark.parametrize("name", ROUTED)
def test_experts_are_swept_beside_our_attention(name: str) -> None:
    """Halves too; scores and texts against models of their own."""
    model, base = (tiny_model(name, torch.float64, seed, initializer_range=0.3) for seed in (0, 1))
    configurations, asked, written = test_forward.chosen(5, 10), test_forward.requests(3), prompts(0)
    with torch.no_grad(), exact_float64():
        got = test_forward.swept(model, configurations, asked, base)
        test_forward.check(got, model, configurations, asked, base, 1e-11)
    texts = test_generate.written(model, configurations, written, base)
    test_generate.check(texts, model, configurations, written, base)


@pytest.mark.parametrize("name", HYBRIDS + ALONE)
def test_layers_whose_attention_is_not_ours_are_swept_whole(name: str) -> None:
    """On their own forward, as their first layer's attention is; against models with the kept layers alone."""
    model, base = (tiny_model(name, torch.float64, seed, initializer_range=0.3) for seed in (0, 1))
    chance = random.Random(0)
    some = [tuple(chance.choices(("keep", "skip", "revert"), k=4)) for _ in range(5)]
    configurations = distinct(map(Configuration, [("keep",) * 4, ("skip",) * 4, *some]))[0]
    layers, asked, written = ResidentLayers(model, base), test_forward.requests(3), prompts(0)
    assert Engine(layers).topology == "whole" and len(layers.reasons) == 1
    assert name in ALONE or layers.reasons == ["its attention is linear"]
    with torch.no_grad(), exact_float64():
        got = score(Engine(layers), SweepHead(model), Trie(configurations, "whole"), asked)
        test_forward.check(got, model, configurations, asked, base, 1e-11)
    texts = generate_fallback(layers, configurations, written, Stops(Numbers(), [END]), Sampling())
    for configuration, answers in zip(configurations, texts, strict=True):
        plain = plain_model(model, configuration, base)
        for request, answer in zip(written, answers, strict=True):
            expected = greedy_tokens(plain, request.tokens, request.max_new_tokens, END)
            assert answer.text == Numbers().decode([i for i in expected if i != END]), configuration.code
    layers.close()


def test_a_whole_sweep_of_experts(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """With its plan and its estimate of the time, which know nothing of what experts take."""
    model, tokenizer = tiny_model("mixtral", vocab_size=300), load_tokenizer(model_folder)
    tasks = [f"text:{text_file}#sw,limit=3"]
    told = cogsym.sweep(model, [{"skip_mlp": [0]}, {"skip_attention": [2]}], tasks, tmp_path, tokenizer=tokenizer)
    assert told is not None and told["configuration"].nunique() == 2 and told["value"].notna().all()
