"""Decoder layers that cogsym has no blocks for run their own forward: against plain models, and left as they were."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import OWN, SHARED_KEYS, VOCABULARY, own_model
from sweeps.plain import greedy_tokens, log_probabilities, plain_in_place
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from cogsym.decoder import layers_of
from cogsym.errors import CogsymError
from cogsym.sweeps.engine.fallback import generate_fallback, only_layers
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.requests import Generate, Score
from cogsym.sweeps.engine.sampling import Sampling, Stops
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers, StreamedLayers
from cogsym.sweeps.layers.configurations import Configuration, distinct
from cogsym.sweeps.layers.trie import Trie

END = 3


class Numbers:
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(f"{i}," for i in ids)


def chosen(name: str, layers: int, seed: int) -> list[Configuration]:
    chance = random.Random(seed)
    fixed = [("keep",) * layers, ("skip",) * layers, ("revert",) * layers]
    if name in SHARED_KEYS:  # the first two layers may only be skipped with the others
        ends = [("keep", "skip"), ("skip", "keep"), ("skip", "skip"), ("revert", "keep")]
        some = [(*chance.choices(("keep", "revert"), k=2), *end) for end in ends]
    else:
        some = [tuple(chance.choices(("keep", "skip", "revert"), k=layers)) for _ in range(5)]
    return distinct(map(Configuration, [*fixed, *some]))[0]


def tokens(chance: random.Random, number: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCABULARY) for _ in range(number))


@pytest.mark.parametrize("name", OWN)
def test_scores_and_texts_are_those_of_plain_models(name: str) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    ours, base = own_model(name, seed), own_model(name, seed + 1)
    configurations = chosen(name, len(layers_of(ours)), seed)
    layers = ResidentLayers(ours, base)
    engine, head = Engine(layers), SweepHead(ours)
    assert engine.topology == "whole"
    trie = Trie(configurations, "whole")
    forwards: list[float] = []
    engine.on_forwards = forwards.append
    asked = [Score(tokens(chance, n), first) for n, first in ((9, 4), (17, 1), (2, 1), (9, 8))]
    prompts = [Generate(tokens(chance, n), most) for n, most in ((5, 7), (11, 3), (1, 7))]
    stops = Stops(Numbers(), [END])
    told = score(engine, head, trie, asked)
    assert sum(forwards) == trie.counts().whole_forwards < len(layers_of(ours)) * len(configurations)
    written = generate_fallback(layers, configurations, prompts, stops, Sampling())
    for c, configuration in enumerate(configurations):
        plain = plain_in_place(ours, configuration, base)
        for request, answer in zip(asked, told[c], strict=True):
            want = log_probabilities(plain, request.tokens)[request.first - 1 :]
            assert answer.log_likelihood == pytest.approx(float(want.sum()), rel=1e-5, abs=2e-5), configuration
            assert answer.num_tokens == len(want)
        for prompt, text in zip(prompts, written[c], strict=True):
            want_ids = greedy_tokens(plain, prompt.tokens, prompt.max_new_tokens, END)
            ended = want_ids[-1] == END
            assert text.text == Numbers().decode(want_ids[:-1] if ended else want_ids), configuration
            assert (text.ended, text.num_tokens) == ("stop" if ended else "length", len(want_ids))


@pytest.mark.parametrize("name", ["bloom", "falcon-h1", "gemma3n"])
def test_streamed_they_are_the_same(name: str, tmp_path: Path) -> None:
    ours, base, chance = own_model(name, 0), own_model(name, 1), random.Random(0)
    configurations = chosen(name, len(layers_of(ours)), 0)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    base.save_pretrained(tmp_path / "base")
    asked, prompts = [Score(tokens(chance, 9), 2), Score(tokens(chance, 4), 1)], [Generate(tokens(chance, 5), 6)]
    told = []
    for layers in (ResidentLayers(ours, base), StreamedLayers(tmp_path / "ours", tmp_path / "base")):
        scored = score(Engine(layers), SweepHead(layers.model), Trie(configurations, "whole"), asked)
        told.append((scored, generate_fallback(layers, configurations, prompts, Stops(Numbers(), [END]), Sampling())))
        layers.revisions()
    assert told[0] == told[1]


def test_layers_that_share_weights_are_not_streamed(tmp_path: Path) -> None:
    own_model("zamba2").save_pretrained(tmp_path)
    with pytest.raises(CogsymError, match=r"layers of Zamba2ForCausalLM share weights such as model.layers.3.*leave"):
        StreamedLayers(tmp_path)


@pytest.mark.parametrize("name", SHARED_KEYS)
def test_layers_whose_keys_others_take_are_not_skipped_alone(name: str) -> None:
    layers, configuration = ResidentLayers(own_model(name)), Configuration(("skip", "keep", "keep", "keep"))
    message = r"skips the layer whose keys and values \(.*\) later layers share; skip it only together"
    with pytest.raises(CogsymError, match=message):
        score(Engine(layers), SweepHead(layers.model), Trie([configuration], "whole"), [Score((1, 2, 4), 1)])
    with pytest.raises(CogsymError, match=message):
        generate_fallback(layers, [configuration], [Generate((1, 2), 3)], Stops(Numbers(), []), Sampling())


def test_layers_that_hand_on_more_than_the_stream_are_refused() -> None:
    config = GlmMoeDsaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, index_topk=4, index_head_dim=8,
        index_n_heads=2,
    )  # fmt: skip
    layers = ResidentLayers(GlmMoeDsaForCausalLM(config).eval())
    with pytest.raises(CogsymError, match=r"layers of GlmMoeDsaForCausalLM hand on .* beside the residual stream"):
        score(
            Engine(layers), SweepHead(layers.model), Trie([Configuration(("keep",) * 3)], "whole"), [Score((1, 2), 1)]
        )


def test_draws_do_not_depend_on_neighbours() -> None:
    ours, chance = own_model("gpt-neox"), random.Random(0)
    layers, stops, sampling = ResidentLayers(ours), Stops(Numbers(), [END]), Sampling(temperature=1.0, seed=5)
    prompts = [Generate(tokens(chance, n), 8) for n in (5, 11, 2)]
    some = [Configuration(("keep",) * 3), Configuration(("keep", "skip", "keep"))]
    together = generate_fallback(layers, some, prompts, stops, sampling)
    alone = [[generate_fallback(layers, [c], [p], stops, sampling)[0][0] for p in prompts] for c in some]
    assert together == alone
    assert together != generate_fallback(layers, some, prompts, stops, Sampling(temperature=1.0, seed=6))


@pytest.mark.parametrize("name", ["gpt2", "falcon", "bamba", "recurrent-gemma"])
def test_only_layers_restores_everything(name: str) -> None:
    """Inside, it is the model that the configuration means; afterwards the one that it was."""
    ours, base = own_model(name, 0), own_model(name, 1)
    layers, ids = ResidentLayers(ours, base), (5, 9, 2, 41, 7)

    def look() -> Any:
        modules = [m for each in (ours, base) for m in each.modules()]
        parts = [(id(m), vars(m).get("forward"), getattr(m, "layer_idx", None), m.training) for m in modules]
        return parts, ours.config.to_dict(), [id(layer) for layer in layers_of(ours)]

    before = look()
    for actions in (("skip", "keep", "revert"), ("skip",) * 3, ("revert",) * 3):
        configuration = Configuration(actions)
        want = log_probabilities(plain_in_place(ours, configuration, base), ids)
        with only_layers(layers, configuration) as model:
            assert model is ours
            torch.testing.assert_close(log_probabilities(model, ids), want)
        assert look() == before
        with pytest.raises(ZeroDivisionError), only_layers(layers, configuration):
            raise ZeroDivisionError
        assert look() == before


def test_an_exception_in_a_pass_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = own_model("gpt-neox")
    want = log_probabilities(ours, (1, 2, 4, 5))
    layers = ResidentLayers(ours)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(layers_of(ours)[1].attention, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            engine = Engine(layers)
            score(engine, SweepHead(ours), Trie([Configuration(("keep",) * 3)], "whole"), [Score((1, 2, 4), 1)])
        with pytest.raises(RuntimeError, match="broken"):
            generate_fallback(
                layers, [Configuration(("keep",) * 3)], [Generate((1, 2), 3)], Stops(Numbers(), []), Sampling()
            )
    assert torch.equal(log_probabilities(ours, (1, 2, 4, 5)), want)


def test_no_half_of_such_a_layer_is_skipped(model_folder: Any, text_file: Any, tmp_path: Any) -> None:
    import cogsym
    from cogsym.models.loading import load_tokenizer

    ours = own_model("gpt-neox", vocab_size=300)
    tokenizer, tasks = load_tokenizer(model_folder), [f"text:{text_file}#sw,limit=3"]
    with pytest.raises(CogsymError, match=r"GPTNeoXLayer is not a decoder layer known to cogsym.*whole layers"):
        cogsym.sweep(ours, [{"skip_mlp": [0]}], tasks, tmp_path / "out", tokenizer=tokenizer)
    told = cogsym.sweep(ours, "grid", tasks, tmp_path / "out", tokenizer=tokenizer)
    assert told is not None and told["configuration"].nunique() == 7
