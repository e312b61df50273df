"""Decoder layers that run their own forward altogether: planned, trained, explained and restored like all others."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import OWN, own_model
from rich.console import Console
from tiny_models import batch
from torch import Tensor, nn

import cogsym
from cogsym.bench.method import saved_bytes
from cogsym.data import Source
from cogsym.decoder import final_norm_of, layers_of
from cogsym.errors import CogsymError
from cogsym.models.loading import load_tokenizer
from cogsym.training.adapters import with_adapters
from cogsym.training.notices import tells_documents_apart
from cogsym.training.settings import TrainSettings


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient of one training step, dropout and all."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model.train()(**inputs, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def planned(name: str) -> tuple[Any, cogsym.LayerPlan]:
    model = own_model(name)
    L = len(layers_of(model))
    return model, cogsym.LayerPlan.layers(L, [0] if name == "zamba2" else [0, L - 1])  # whose last shares weights


@pytest.mark.parametrize("name", OWN)
def test_frozen_layers_are_computed_again_and_nothing_differs(name: str) -> None:
    model, plan = planned(name)
    for part in plan.parts(model):
        for p in part.parameters:
            p.requires_grad_(part.trained)
    kinds = ("plain", "padded-right", "padded-left", "packed")
    batches = [batch(kind) for kind in kinds if kind != "packed" or name not in ("bloom", "mpt")]  # without positions
    want = [gradients(model, inputs) for inputs in batches]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for keep, inputs, truth in zip(("input", "all", "nothing", "attention"), batches, want, strict=False):
        cogsym.prepare(model, plan, keep=keep)
        got = gradients(model, inputs)
        assert got.keys() == truth.keys()
        assert all(torch.equal(got[n], truth[n]) for n in truth), keep
    frozen = [layer for layer in cogsym.explain(model).layers if layer.trained == "frozen"]
    assert len(frozen) == len(layers_of(model)) - len(plan.trained)
    assert all(
        layer.path == "own forward" and layer.reason.endswith("known to cogsym; checkpointed") for layer in frozen
    )
    cogsym.restore(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", OWN)
def test_every_parameter_of_the_decoder_has_its_part(name: str) -> None:
    model = own_model(name)
    found = final_norm_of(model)
    plan = cogsym.LayerPlan.all(len(layers_of(model)))
    parts = {part.name: part for part in plan.parts(model)}
    assert found is not None and {id(p) for p in parts["final norm"].parameters} == set(map(id, found[1].parameters()))
    assert "other" not in parts
    assert sum(part.num_parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())
    cogsym.prepare(model, plan)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "xglm", "falcon"])
def test_a_frozen_layer_keeps_its_input_alone(name: str) -> None:
    held = {}
    for keep in ("all", "nothing"):
        model, plan = planned(name)
        cogsym.prepare(model, plan, keep=keep)
        inputs = batch("plain")
        held[keep] = saved_bytes(lambda model=model, inputs=inputs: model.train()(**inputs, use_cache=False).loss)
    assert held["nothing"] < 0.8 * held["all"]


def test_a_cache_is_filled_once() -> None:
    """GPT-2 hands it to its blocks without a keyword."""
    model, plan = planned("gpt2")
    ids = batch("plain")["input_ids"]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    cogsym.prepare(model, plan, keep="nothing").train()
    out = model(ids, use_cache=True)
    out.logits.sum().backward()
    assert out.past_key_values.get_seq_length(1) == ids.shape[1]


def test_layers_that_share_weights_are_trained_together() -> None:
    model = own_model("zamba2")
    with pytest.raises(CogsymError, match=r"Layers 1 and 3 of the model share weights.* only layer 3; train both or"):
        cogsym.prepare(model, cogsym.LayerPlan.layers(4, [3]))
    cogsym.prepare(model, cogsym.LayerPlan.layers(4, [1, 3]))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "recurrent-gemma"])
def test_adapters_are_put_on_planned_layers(name: str) -> None:
    model = with_adapters(own_model(name), cogsym.LayerPlan.layers(3, [0, 2]), rank=2)
    layers = layers_of(model)
    adapted = [any("lora_" in n for n, _ in layer.named_parameters()) for layer in layers]
    assert adapted == [True, False, True]


def test_adapters_that_peft_refuses() -> None:
    with pytest.raises(
        CogsymError, match=r"LoRA does not fit FalconH1ForCausalLM \(.*out_proj.*\); train whole layers"
    ):
        with_adapters(own_model("falcon-h1"), cogsym.LayerPlan.layers(3, [0]), rank=2)


def test_whether_documents_of_a_row_see_each_other() -> None:
    """As `cogsym train` packs them; the model is left in the mode it was in."""
    apart = {name: tells_documents_apart(own_model(name).train()) for name in ("gpt2", "gpt-neox", "bloom", "bamba")}
    assert apart == {"gpt2": True, "gpt-neox": True, "bloom": False, "bamba": False}


def test_train_says_so(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model, source, said = own_model("bloom", vocab_size=300), Source(text_file, field="sw"), io.StringIO()
    settings = TrainSettings(length=64, batch_size=2, steps=2, learning_rate=1e-2, dtype="fp32")
    result = cogsym.train(
        model, [source], tmp_path / "out", tokenizer=load_tokenizer(model_folder), evaluate={"sw": source},
        settings=settings, console=Console(file=said, width=200),
    )  # fmt: skip
    before, after = result.bits_per_byte("sw")[0], result.bits_per_byte("sw")[-1]
    assert after < before
    assert "documents in one row see each other: BloomForCausalLM does not tell them apart" in said.getvalue()
