"""Weights of 16 bits with arithmetic in float32, as where a processor has no unit for bfloat16."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, tiny_model

import cogsym
from cogsym import LayerPlan, TrainSettings
from cogsym.data import Source
from cogsym.models import precision

# With biases, layer norms, an embedding that is more than one, experts that run their own forward.
FAMILIES = ("llama", "qwen2", "gemma3", "stablelm", "mixtral")


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_model_is_the_float32_model_of_its_weights(family: str, dtype: torch.dtype) -> None:
    """Logits, loss and gradients, prepared too; and narrowed it is what it was, bit for bit."""
    model = tiny_model(family, dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wide = copy.deepcopy(model).float()
    if family == "gemma3":  # its scale of the embeddings is rounded to their type
        wide.model.embed_tokens.embed_scale.copy_(model.model.embed_tokens.embed_scale.to(dtype))
    precision.widen(model)
    assert precision.stream_dtype(model) == torch.float32
    assert list(model.state_dict()) == list(before)
    ids = torch.randint(VOCABULARY, (2, 15))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wide(ids).logits, rtol=1e-5, atol=1e-5)
    layers = len(model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h)
    for each in (model, wide):
        cogsym.prepare(each, LayerPlan.outer(layers)).train()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    losses = [loss_of(each, ids) for each in (model, wide)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    cogsym.restore(model)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    precision.narrow(model)
    for name, t in model.state_dict().items():
        if name not in trained:
            assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name
    assert not any(hasattr(module, "_cogsym_forward") or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3"])
def test_its_weights_take_half_the_bytes(family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    stored = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    precision.widen(model)
    assert sum(p.nbytes for p in model.parameters() if p.dim() == 2) == stored
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.dim() == 1)


def test_what_another_library_put_on_a_module_is_left_to_it() -> None:
    model = tiny_model("llama", torch.bfloat16)
    head = model.lm_head
    head.forward = lambda x: torch.nn.Linear.forward(head, x)
    precision.widen(model)
    assert head.weight.dtype == torch.float32
    ids = torch.randint(VOCABULARY, (1, 5))
    assert model(ids).logits.dtype == torch.float32
    precision.narrow(model)
    assert head.weight.dtype == torch.bfloat16 and "forward" in vars(head)


def trained(model: Path, text: Path, out: Path, **more: Any) -> Any:
    resume = more.pop("resume", False)
    settings = TrainSettings(**{"length": 64, "batch_size": 2, "steps": 4, "save_every": 2, "log_every": 1, **more})
    return cogsym.train(model, [Source(text, field="sw")], out, settings=settings, resume=resume)


@pytest.mark.usefixtures("slow_halves")
def test_training_by_default_is_that_in_float32(
    bf16_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bf16_checkpoint
    result = trained(base, text_file, tmp_path / "auto")
    assert "bfloat16 weights, float32 products: " in " ".join(capsys.readouterr().err.split())
    other = trained(base, text_file, tmp_path / "fp32", dtype="fp32")
    losses = [[line["loss"] for line in each.history if "loss" in line] for each in (result, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert json.loads((tmp_path / "auto/settings.json").read_text())["products"] == "float32"
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "auto/model/model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    frozen = [name for name in before if ".layers.0." not in name and ".layers.3." not in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("began_slow", [True, False])
def test_a_resumed_run_keeps_the_arithmetic_it_began_with(
    bf16_checkpoint: Path, text_file: Path, tmp_path: Path, slow_halves: Callable[[bool], None], began_slow: bool
) -> None:
    base, out = bf16_checkpoint, tmp_path / "out"
    slow_halves(began_slow)
    whole = trained(base, text_file, tmp_path / "whole")
    trained(base, text_file, out, steps=2, schedule="linear", warmup=0.0)
    record = json.loads((out / "settings.json").read_text())
    assert record["products"] == ("float32" if began_slow else "bfloat16")
    assert whole.steps == 4
    slow_halves(not began_slow)
    trained(base, text_file, out, steps=2, schedule="linear", warmup=0.0, resume=True)
    assert json.loads((out / "settings.json").read_text())["products"] == record["products"]


@pytest.mark.usefixtures("slow_halves")
def test_bfloat16_products_that_are_asked_for_are_warned_of(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(model_folder, text_file, tmp_path / "out", steps=1, dtype="bf16")
    assert "Warning: bfloat16 products, and " in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "out/settings.json").read_text())["products"] == "bfloat16"
