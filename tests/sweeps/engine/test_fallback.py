"""Decoder layers that cogsym has no blocks for run their own forward: against plain models, and left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps.plain import greedy_tokens, log_probabilities, plain_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)  # fmt: skip

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

L, VOCABULARY, END = 3, 61, 3
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": L,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "sliding_window": None}
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SHAPE, **_EXPERTS, num_local_experts=3)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**_SHAPE, **_EXPERTS, num_experts=3, moe_intermediate_size=12, shared_expert_intermediate_size=8)
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"})
    ),
    "cohere": lambda: CohereForCausalLM(
        CohereConfig(**_SHAPE, logit_scale=0.3, tie_word_embeddings=True, use_qk_norm=True)
    ),
}


class Numbers:
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(f"{i}," for i in ids)


def model(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def chosen(seed: int) -> list[Configuration]:
    chance, actions = random.Random(seed), ("keep", "skip", "revert")
    fixed: list[tuple[str, ...]] = [("keep",) * L, ("skip",) * L, ("revert",) * L, ("keep", "skip", "revert")]
    some = [tuple(chance.choices(actions, k=L)) for _ in range(6)]
    return distinct(map(Configuration, [*fixed, *some]))[0]


def tokens(chance: random.Random, number: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCABULARY) for _ in range(number))


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_texts_are_those_of_plain_models(name: str) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    ours, base, configurations = model(name, seed), model(name, seed + 1), chosen(seed)
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
    assert sum(forwards) == trie.counts().whole_forwards < L * len(configurations)
    written = generate_fallback(layers, configurations, prompts, stops, Sampling())
    for c, configuration in enumerate(configurations):
        plain = plain_model(ours, configuration, base)
        for request, answer in zip(asked, told[c], strict=True):
            want = log_probabilities(plain, request.tokens)[request.first - 1 :]
            assert answer.log_likelihood == pytest.approx(float(want.sum()), rel=1e-5, abs=2e-5), configuration
            assert answer.num_tokens == len(want)
        for prompt, text in zip(prompts, written[c], strict=True):
            want_ids = greedy_tokens(plain, prompt.tokens, prompt.max_new_tokens, END)
            ended = want_ids[-1] == END
            assert text.text == Numbers().decode(want_ids[:-1] if ended else want_ids), configuration
            assert (text.ended, text.num_tokens) == ("stop" if ended else "length", len(want_ids))


def test_streamed_they_are_the_same(tmp_path: Path) -> None:
    ours, base, chance, configurations = model("cohere", 0), model("cohere", 1), random.Random(0), chosen(0)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    base.save_pretrained(tmp_path / "base")
    asked, prompts = [Score(tokens(chance, 9), 2), Score(tokens(chance, 4), 1)], [Generate(tokens(chance, 5), 6)]
    told = []
    for layers in (ResidentLayers(ours, base), StreamedLayers(tmp_path / "ours", tmp_path / "base")):
        scored = score(Engine(layers), SweepHead(layers.model), Trie(configurations, "whole"), asked)
        told.append((scored, generate_fallback(layers, configurations, prompts, Stops(Numbers(), [END]), Sampling())))
        layers.revisions()
    assert told[0] == told[1]


def test_draws_do_not_depend_on_neighbours() -> None:
    ours, chance = model("mixtral", 0), random.Random(0)
    layers, stops, sampling = ResidentLayers(ours), Stops(Numbers(), [END]), Sampling(temperature=1.0, seed=5)
    prompts = [Generate(tokens(chance, n), 8) for n in (5, 11, 2)]
    some = [Configuration(("keep",) * L), Configuration(("keep", "skip", "keep"))]
    together = generate_fallback(layers, some, prompts, stops, sampling)
    alone = [[generate_fallback(layers, [c], [p], stops, sampling)[0][0] for p in prompts] for c in some]
    assert together == alone
    assert together != generate_fallback(layers, some, prompts, stops, Sampling(temperature=1.0, seed=6))


@pytest.mark.parametrize("name", MODELS)
def test_only_layers_restores_everything(name: str) -> None:
    ours, base = model(name, 0), model(name, 1)
    layers = ResidentLayers(ours, base)

    def look() -> Any:
        parts = [(id(m), getattr(m, "layer_idx", None), m.training) for each in (ours, base) for m in each.modules()]
        return parts, ours.config.to_dict(), [id(layer) for layer in ours.get_decoder().layers]

    before = look()
    for actions in (("skip", "keep", "revert"), ("skip",) * L, ("revert",) * L):
        configuration = Configuration(actions)
        with only_layers(layers, configuration) as short:
            assert short is ours
            assert len(ours.get_decoder().layers) == ours.config.num_hidden_layers == L - actions.count("skip")
            assert [
                next(m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx"))
                for layer in short.base_model.layers
            ] == list(range(ours.config.num_hidden_layers))
        assert look() == before
        with pytest.raises(ZeroDivisionError), only_layers(layers, configuration):
            raise ZeroDivisionError
        assert look() == before


def test_an_exception_in_a_pass_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model("mixtral", 0)
    want = log_probabilities(ours, (1, 2, 4, 5))
    layers = ResidentLayers(ours)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(ours.model.layers[1].self_attn, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            engine = Engine(layers)
            score(engine, SweepHead(ours), Trie([Configuration(("keep",) * L)], "whole"), [Score((1, 2, 4), 1)])
        with pytest.raises(RuntimeError, match="broken"):
            generate_fallback(
                layers, [Configuration(("keep",) * L)], [Generate((1, 2), 3)], Stops(Numbers(), []), Sampling()
            )
    assert torch.equal(log_probabilities(ours, (1, 2, 4, 5)), want)


def test_no_half_of_such_a_layer_is_skipped(model_folder: Any, text_file: Any, tmp_path: Any) -> None:
    import cogsym
    from cogsym.models.loading import load_tokenizer

    torch.manual_seed(0)
    ours = MixtralForCausalLM(MixtralConfig(**{**_SHAPE, "vocab_size": 300}, **_EXPERTS, num_local_experts=3))
    tokenizer, tasks = load_tokenizer(model_folder), [f"text:{text_file}#sw,limit=3"]
    with pytest.raises(CogsymError, match=r"MixtralDecoderLayer is not a decoder layer known to cogsym.*whole layers"):
        cogsym.sweep(ours, [{"skip_mlp": [0]}], tasks, tmp_path / "out", tokenizer=tokenizer)
    told = cogsym.sweep(ours, "grid", tasks, tmp_path / "out", tokenizer=tokenizer)
    assert told is not None and told["configuration"].nunique() == 7
