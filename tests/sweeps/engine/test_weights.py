"""Layers read from disk one at a time against the same layers in memory."""

from __future__ import annotations

import json
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps.engine.test_generate import END, Numbers, chosen, prompts
from tiny_models import VARIANTS, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

from cogsym.errors import CogsymError
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.generate import generate
from cogsym.sweeps.engine.prefixes import Batch
from cogsym.sweeps.engine.requests import Score
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import LayerSource, ResidentLayers, StreamedLayers
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.schedule import needed, schedule
from cogsym.sweeps.layers.trie import Trie


def saved(model: Any, folder: Path, sharded: bool = True) -> Path:
    model.save_pretrained(folder, max_shard_size="25KB" if sharded else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == sharded
    return folder


def states(layers: LayerSource, configurations: list[Configuration], seed: int) -> dict[int, Tensor]:
    chance = random.Random(seed)
    sequences = [tuple(chance.choices(range(VOCABULARY), k=chance.randint(4, 20))) for _ in range(4)]
    sequences.append(sequences[0][:9] + sequences[1][-3:])
    batch = Batch(sequences, [(i, len(s) - 1 - j) for i, s in enumerate(sequences) for j in range(2)])
    ended: dict[int, Tensor] = {}

    def on_ends(configurations: list[tuple[int, ...]], hidden: Tensor) -> None:
        for same, state in zip(configurations, hidden.clone(), strict=True):
            ended.update(dict.fromkeys(same, state))

    engine = Engine(layers)
    engine.run(Trie(configurations, engine.topology), batch, on_ends)
    return ended


@pytest.mark.parametrize("variant", [*VARIANTS, "apertus", "cohere2", "ministral3", "starcoder2"])
def test_streamed_is_resident_bit_for_bit(variant: str, tmp_path: Path) -> None:
    """Every family, weights in several files, with a base: states, scores, texts and revisions."""
    seed = random.randrange(10**6)
    print("seed", seed)
    model, base = tiny_model(variant, seed=seed), tiny_model(variant, seed=seed + 1)
    streamed = StreamedLayers(saved(model, tmp_path / "model"), saved(base, tmp_path / "base", sharded=False))
    resident = ResidentLayers(model, base)
    assert not streamed.reasons and streamed.has_base
    configurations = chosen(seed)
    want, got = states(resident, configurations, seed), states(streamed, configurations, seed)
    assert got.keys() == want.keys() == set(range(len(configurations)))
    assert all(torch.equal(got[c], want[c]) for c in want)
    trie, stops = Trie(configurations, Engine(resident).topology), Stops(Numbers(), [END])
    asked = [Score(request.tokens, 3) for request in prompts(seed)]
    answers = []
    for layers in (resident, streamed):
        engine, head = Engine(layers), SweepHead(layers.model)
        answers.append((score(engine, head, trie, asked), generate(engine, head, trie, prompts(seed), stops)))
    assert answers[0] == answers[1]
    assert streamed.revisions() == resident.revisions()
    assert streamed.revisions()["model"] != streamed.revisions()["base"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_chosen_or_the_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    from cogsym.models.loading import load_model

    saved(tiny_model("gemma3", torch.bfloat16), tmp_path)
    streamed = StreamedLayers(tmp_path, dtype=None if dtype == torch.bfloat16 else dtype)
    resident = ResidentLayers(load_model(tmp_path, dtype))
    configurations = [c for c in chosen(3) if "revert" not in c.actions]
    want, got = states(resident, configurations, 3), states(streamed, configurations, 3)
    assert all(got[c].dtype == dtype and torch.equal(got[c], want[c]) for c in want)
    assert streamed.revisions() == resident.revisions()


def test_no_more_than_two_layers_are_there(tmp_path: Path) -> None:
    streamed = StreamedLayers(saved(tiny_model("llama"), tmp_path))
    there: list[Any] = []
    most = 0
    for loaded in streamed.walk([(i % 4, {"model"}) for i in range(12)]):
        there.append(weakref.ref(loaded["model"].layer))
        assert loaded["model"].layer.mlp.up_proj.weight.device.type == "cpu"
        most = max(most, sum(ref() is not None for ref in there))
    assert most == 1  # and the one being read
    del loaded
    assert not any(ref() is not None for ref in there)
    assert all(p.is_meta for layer in streamed.model.get_decoder().layers for p in layer.parameters())


def test_only_the_layers_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedLayers(saved(tiny_model("llama"), tmp_path))
    read: list[int] = []
    load = streamed._load
    monkeypatch.setattr(streamed, "_load", lambda layer, weights: (read.append(layer), load(layer, weights))[1])
    states(streamed, [Configuration.of(4, {"skip": [0, 2]})], 0)
    assert read == [1, 3]
    trie = Trie([Configuration.of(4, {"skip": [0]}), Configuration.of(4, {"skip": [1]})])
    assert needed(schedule(trie, narrow=True).by_layer()) == [(i, {"model"}) for i in range(4)]


def test_what_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny_model("llama"), tmp_path / "model", sharded=False)
    with pytest.raises(CogsymError, match="shape"):
        StreamedLayers(tmp_path / "model", saved(tiny_model("llama", intermediate_size=56), tmp_path / "wide"))
    with pytest.raises(CogsymError, match="has 3 layers, expected 4"):
        StreamedLayers(tmp_path / "model", saved(tiny_model("llama", num_hidden_layers=3), tmp_path / "short"))
    with pytest.raises(CogsymError, match="Qwen2DecoderLayers, expected LlamaDecoderLayers"):
        StreamedLayers(tmp_path / "model", saved(tiny_model("qwen2"), tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CogsymError, match="no model folder"):
        StreamedLayers(tmp_path / "nowhere")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CogsymError, match=r"no weight named model.layers.2.mlp.up_proj.weight"):
        StreamedLayers(tmp_path / "model")
    file = saved(tiny_model("llama-tied-gelu"), tmp_path / "tied", sharded=False) / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CogsymError, match=r"different weights named lm_head.weight and model.embed_tokens.weight"):
        StreamedLayers(tmp_path / "tied")
    experts = {"num_local_experts": 2, "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8}
    mixtral = MixtralForCausalLM(MixtralConfig(**experts, num_hidden_layers=2, num_attention_heads=2))
    mixtral.save_pretrained(tmp_path / "mixtral")
    with pytest.raises(CogsymError, match="leave streaming off"):
        StreamedLayers(tmp_path / "mixtral")


def test_shapes_of_a_base_in_memory() -> None:
    with pytest.raises(CogsymError, match="has 3 layers, expected 4"):
        ResidentLayers(tiny_model("llama"), tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(CogsymError, match=r"has shape \(56, 36\), expected \(52, 36\)"):
        ResidentLayers(tiny_model("llama"), tiny_model("llama", intermediate_size=56))
    config = BertConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8, intermediate_size=8, vocab_size=9)
    with pytest.raises(CogsymError, match="BertLMHeadModel has no decoder layers"):
        ResidentLayers(BertLMHeadModel(config))


def test_a_damaged_index_does_no_harm(tmp_path: Path) -> None:
    """Names are read off the files themselves."""
    saved(tiny_model("llama"), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert len(list(StreamedLayers(tmp_path).walk([(0, {"model"}), (3, {"model"})]))) == 2


def test_closed_the_weights_lie_as_before() -> None:
    model, base = tiny_model("llama"), tiny_model("llama", seed=1)
    before = [{n: (p.data_ptr(), p.clone()) for n, p in m.named_parameters()} for m in (model, base)]
    layers = ResidentLayers(model, base)
    q, k = (getattr(model.model.layers[0].self_attn, n).weight for n in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    layers.close()
    for m, were in zip((model, base), before, strict=True):
        for name, p in m.named_parameters():
            assert torch.equal(p, were[name][1])
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
