"""Optimizers by Trainer's names: refused before anything is loaded, or trained with, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.killed import killed_in_step
from transformers import trainer_optimizer

import cogsym
from cogsym import CogsymError, TrainSettings
from cogsym.data import Source
from cogsym.training import checkpoint, finetune
from cogsym.training.optimizer import check_optimizer
from cogsym.training.trainer import OuterTrainer

SETTINGS: dict[str, Any] = {
    "length": 64, "batch_size": 2, "steps": 6, "learning_rate": 1e-2, "dtype": "fp32", "save_every": 3,
}  # fmt: skip


def run(model: Path, text: Path, out: Path, resume: bool = False, **changes: Any) -> cogsym.TrainResult:
    settings = TrainSettings(**SETTINGS, **changes)
    return cogsym.train(model, [Source(text, field="sw")], out, settings=settings, resume=resume)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
def test_a_run_resumes_with_its_own_optimizer_bit_for_bit(
    model_folder: Path, text_file: Path, tmp_path: Path, optim: str
) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    whole = run(model_folder, text_file, tmp_path / "whole", optim=optim)
    with killed_in_step(5):
        run(model_folder, text_file, tmp_path / "cut", optim=optim)
    with pytest.raises(CogsymError, match=rf"was started with optim {optim} \(now sgd\)"):
        run(model_folder, text_file, tmp_path / "cut", resume=True, optim="sgd")
    resumed = run(model_folder, text_file, tmp_path / "cut", resume=True, optim=optim)
    base, want, got = (
        load_file(folder / "model.safetensors") for folder in (model_folder, whole.folder, resumed.folder)
    )
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not torch.equal(want["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_nested_and_shared_states_are_saved_and_those_of_an_earlier_version_read(tmp_path: Path) -> None:
    def optimizer() -> tuple[Any, Any]:
        made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3)) for _ in range(2)], lr=0.1)
        return made, torch.optim.lr_scheduler.ConstantLR(made)

    table = torch.arange(4.0)
    states = [{"step": i, "quantised": {"codes": torch.full((3,), i), "table": table}} for i in range(2)]
    saved, scheduler = optimizer()
    for p, state in zip(saved.param_groups[0]["params"], states, strict=True):
        saved.state[p] = state
    tensors, _ = checkpoint.optimizer_state(saved)
    checkpoint.save_optimizer(saved, scheduler, tensors, tmp_path / "state.safetensors")
    read, scheduler = optimizer()
    checkpoint.load_optimizer(read, scheduler, tmp_path / "state.safetensors")
    for p, state in zip(read.param_groups[0]["params"], states, strict=True):
        got = read.state[p]
        assert got["step"] == state["step"] and got["quantised"].keys() == state["quantised"].keys()
        assert all(torch.equal(got["quantised"][name], value) for name, value in state["quantised"].items())
    described = {
        "groups": json.dumps(saved.state_dict()["param_groups"]),
        "scheduler": json.dumps(scheduler.state_dict()),
    }
    save_file({"1.momentum_buffer": table}, tmp_path / "earlier.safetensors", described)
    read, scheduler = optimizer()
    checkpoint.load_optimizer(read, scheduler, tmp_path / "earlier.safetensors")
    assert torch.equal(read.state[read.param_groups[0]["params"][1]]["momentum_buffer"], table)


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        ("adamw_fused", "The optimizer .* 'adamw_fused' is unknown, .* did you mean adamw_torch_fused"),
        ("adamw_8bit", "optim is adamw_8bit, which is not installed; `pip install -U bitsandbytes` does that"),
        ("grokadamw", "optim is grokadamw, which is not installed; `pip install grokadamw` does that"),
        ("adamw_torch_xla", "optim is adamw_torch_xla, which does not run here"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_a_model_is_loaded(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, told: str
) -> None:
    for package in ("bitsandbytes", "grokadamw"):
        monkeypatch.setattr(trainer_optimizer, f"is_{package}_available", lambda *_: False)
    monkeypatch.setattr(finetune, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(CogsymError, match=told):
        run(model_folder, text_file, tmp_path / "out", optim=optim)
    assert not (tmp_path / "out").exists()


def test_optimizers_that_do_not_suit_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for packages that are not installed here."""

    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    class Projected(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.state[self.param_groups[0]["params"][0]]["projector"] = object()

    for made, told in (
        ((ScheduleFree, {"lr": 0.1}), "whose weights in training are not those of the model"),
        ((Projected, {"lr": 0.1}), "whose state is not of plain tensors and numbers"),
        ((torch.optim.SGD, {"lr": 0.1, "optimizer_dict": {}}), "which steps within the backward pass"),
    ):
        monkeypatch.setattr(OuterTrainer.__base__, "get_optimizer_cls_and_kwargs", lambda *_, made=made: made)
        with pytest.raises(CogsymError, match=told):
            check_optimizer(TrainSettings(optim="sgd"))


def test_bytes_of_states_for_each_parameter() -> None:
    found = {name: check_optimizer(TrainSettings(optim=name)) for name in ("adamw_torch_fused", "rmsprop", "sgd")}
    assert found == {"adamw_torch_fused": 8, "rmsprop": 4, "sgd": 0}
