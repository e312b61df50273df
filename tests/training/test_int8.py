"""Frozen weights in 8 bits against a model whose frozen weights are the values that the integers stand for."""

from __future__ import annotations

import copy
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import cogsym
from cogsym import CogsymError, LayerPlan, TrainSettings
from cogsym.data import Source
from cogsym.decoder import layers_of
from cogsym.models.int8 import int8_modules
from cogsym.models.projections import SCALE
from cogsym.ops.int8_linear import dequantised

PLAN = LayerPlan.layers(4, "0,3")
VARIANTS = ("llama-biases", "qwen3", "gemma2", "phi3")
KEEPS = ("all", "attention", "input", "nothing")


def saved(variant: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    tiny_model(variant, dtype, num_hidden_layers=4).save_pretrained(folder, max_shard_size="60KB")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def rounded(model: Any) -> Any:
    """An ordinary model with the values that the quantised modules of a prepared one stand for."""
    plain = copy.deepcopy(model)
    values = {n: (m.weight, getattr(m, SCALE)) for n, m in model.named_modules() if m in int8_modules(model)}
    cogsym.restore(plain)
    for name, (weight, scale) in values.items():
        module = plain.get_submodule(name)
        module.weight.data = dequantised(weight, scale, module.weight.dtype)
    for i, layer in enumerate(layers_of(plain)):
        layer.requires_grad_(i in PLAN.trained)
    return plain


def step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and n.startswith("model.layers.")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_the_values_that_are_held(tmp_path: Path, variant: str) -> None:
    prepared = cogsym.prepare(saved(variant, tmp_path), PLAN, keep="all", frozen_weights="int8")
    held = int8_modules(prepared)
    assert held and all(m.weight.dtype == torch.int8 for m in held)
    linear = [m for i in (1, 2) for m in layers_of(prepared)[i].modules() if isinstance(m, nn.Linear)]
    assert {*held} == {*linear}
    plain, ids = rounded(prepared), torch.randint(0, prepared.config.vocab_size, (2, 19))
    exact = step(copy.deepcopy(plain).double(), ids)
    theirs = step(plain, ids)
    for keep in KEEPS:
        cogsym.restore(prepared)
        cogsym.prepare(prepared, PLAN, keep=keep, frozen_weights="int8")
        ours = step(prepared, ids)
        assert ours.keys() == exact.keys()
        eps, ratios = torch.finfo(torch.float32).eps, []
        for name, want in exact.items():
            errors = [float((got[name].double() - want).norm() / want.norm()) for got in (ours, theirs)]
            ratios.append((errors[0] + eps) / (errors[1] + eps))
        # A single tensor's is chance where much cancels; together they tell.
        assert statistics.geometric_mean(ratios) < 2 and max(ratios) < 10, (keep, ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_stays_an_ordinary_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved("llama", tmp_path / "base", dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bytes_before = sum(p.nbytes for layer in (1, 2) for p in layers_of(model)[layer].parameters() if p.dim() == 2)
    cogsym.prepare(model, PLAN, frozen_weights="int8")
    assert sum(m.weight.nbytes for m in int8_modules(model)) == bytes_before // dtype.itemsize
    assert f"{len(int8_modules(model))} linear maps in int8" in str(cogsym.explain(model))
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(t, before[name]) and t.dtype == dtype for name, t in state.items())
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").state_dict()
    assert all(torch.equal(t, before[name]) for name, t in again.items()) and again.keys() == before.keys()
    model.load_state_dict(before)  # its own weights are taken
    with pytest.raises(CogsymError, match=r"layers\.1\.\S+weight is given another value while it is frozen in int8"):
        model.load_state_dict({name: t + 1 for name, t in before.items()})
    cogsym.restore(model)
    assert not int8_modules(model) and not any("forward" in vars(m) for m in model.modules())
    frozen = [name for name in before if name.startswith(("model.layers.1.", "model.layers.2."))]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)
    assert not any(name.endswith(SCALE) for name, _ in model.named_buffers())


def test_what_cannot_be_saved_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CogsymError, match="The model was not loaded from a folder, expected one"):
        cogsym.prepare(tiny_model("llama", num_hidden_layers=4), PLAN, frozen_weights="int8")
    model = saved("llama", tmp_path)
    with pytest.raises(CogsymError, match="frozen_weights is 'int4', expected 'int8'"):
        cogsym.prepare(model, PLAN, frozen_weights="int4")  # type: ignore[arg-type]
    with torch.no_grad():
        layers_of(model)[1].mlp.up_proj.weight += 1
    needed = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CogsymError, match=r"layers\.1\.mlp\.up_proj\.weight is not in \S+ as the model has it"):
        cogsym.prepare(model, PLAN, frozen_weights="int8")
    assert [p.requires_grad for p in model.parameters()] == needed and not int8_modules(model)
    with torch.no_grad():
        layers_of(model)[1].mlp.up_proj.weight -= 1
    streamed = cogsym.load_streamed(tmp_path, PLAN)
    with pytest.raises(CogsymError, match="frozen_weights is 'int8' and the frozen layers are read from disk"):
        cogsym.prepare(streamed, PLAN, frozen_weights="int8")


def test_a_file_that_changed_since_is_not_saved_as_if_it_had_not(tmp_path: Path) -> None:
    model = cogsym.prepare(saved("llama", tmp_path), PLAN, frozen_weights="int8")
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: t + 1 for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CogsymError, match=r"holds another model\.layers\.\S+ than when the frozen weights were"):
        model.state_dict()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CogsymError, match=r"does not give model\.layers\.\S+ any more"):
        cogsym.restore(model)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_a_run_saves_frozen_weights_as_they_were_and_resumes(
    model_folder: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = Source(text_file, field="sw")

    def run(out: str, steps: int = 4, resume: bool = False, **more: Any) -> cogsym.TrainResult:
        asked = {"length": 48, "batch_size": 2, "steps": steps, "learning_rate": 1e-2, "dtype": "fp32", "log_every": 1}
        settings = TrainSettings(**{**asked, "frozen_weights": "int8", "save_every": 2, **changes, **more})
        return cogsym.train(model_folder, [source], tmp_path / out, settings=settings, resume=resume)

    result = run("whole")
    base, got = (load_file(folder / "model.safetensors") for folder in (model_folder, result.folder))
    assert base.keys() == got.keys()
    changed = {name.split(".")[2] for name in base if not torch.equal(base[name], got[name])}
    layers = len(layers_of(result.model))
    assert changed == {str(i) for i in LayerPlan.outer(layers).trained}
    exact = run("exact", frozen_weights=None)
    losses = [[line["loss"] for line in r.history if "loss" in line] for r in (result, exact)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    shutil.rmtree(again / "checkpoints" / "checkpoint-4")
    shutil.rmtree(again / "model")
    resumed = run("again", resume=True)
    assert all(torch.equal(t, got[name]) for name, t in load_file(resumed.folder / "model.safetensors").items())
