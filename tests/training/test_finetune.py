"""`cogsym.train` end to end on a tiny model: what it writes, resuming, and every way it can end early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import cogsym
from cogsym import CogsymError, LayerPlan, RunStopped, TrainSettings
from cogsym.data import Document, Source
from cogsym.training.run_folder import RunFolder
from cogsym.training.trainer import OuterTrainer

SETTINGS: dict[str, Any] = {
    "length": 64, "batch_size": 2, "steps": 8, "learning_rate": 1e-2, "dtype": "fp32", "save_every": 3, "log_every": 1,
}  # fmt: skip


def run(model_folder: Path, text_file: Path, out: Path, resume: bool = False, **changes: Any) -> cogsym.TrainResult:
    source = Source(text_file, field="sw")
    settings = TrainSettings(**{**SETTINGS, **changes})
    return cogsym.train(model_folder, [source], out, evaluate={"sw": source}, settings=settings, resume=resume)


def weights(result: cogsym.TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(_model_folder: Path, _text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> cogsym.TrainResult:
    """A run that nothing disturbs."""
    return run(_model_folder, _text_file, tmp_path_factory.mktemp("whole") / "out")


def test_it_learns_and_writes_what_it_promises(whole: cogsym.TrainResult) -> None:
    before, after = whole.bits_per_byte("sw")
    assert after < 0.8 * before
    assert whole.steps == 8
    out = whole.folder.parent
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "loss.png", "metrics.jsonl", "model", "settings.json", "train.lock",
    ]  # fmt: skip
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert lines == whole.history
    assert [p.name for p in RunFolder(out).complete_checkpoints()] == ["checkpoint-6", "checkpoint-8"]


def test_plain_transformers_loads_the_result_and_only_the_outer_layers_moved(
    model_folder: Path, whole: cogsym.TrainResult
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(whole.folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.use_cache  # Trainer had switched it off
    AutoTokenizer.from_pretrained(whole.folder)
    base = load_file(model_folder / "model.safetensors")
    moved = {name.split(".")[2] for name, w in weights(whole).items() if not torch.equal(w, base[name])}
    assert moved == {"0", "3"}
    outer = ("model.layers.0.", "model.layers.3.")
    assert whole.trained_parameters == sum(w.numel() for n, w in base.items() if n.startswith(outer))
    assert all(torch.equal(p, weights(whole)[n]) for n, p in whole.model.named_parameters() if n != "lm_head.weight")


def test_checkpoints_hold_the_trained_parameters_alone(whole: cogsym.TrainResult) -> None:
    saved = load_file(whole.folder.parent / "checkpoints" / "checkpoint-8" / "trained.safetensors")
    assert {name.split(".")[2] for name in saved} == {"0", "3"}


class Killed(BaseException):
    """Stands for a process that is gone."""


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "schedule": "linear"}, {"lora_rank": 2}], ids=str)
def test_resuming_gives_the_weights_of_an_uninterrupted_run_bit_for_bit(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = run(model_folder, text_file, tmp_path / "whole", **changes)

    step = OuterTrainer.check_gradients

    def dies_in_step_5(self: OuterTrainer) -> None:
        if self.state.global_step == 4:
            raise Killed
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(OuterTrainer, "check_gradients", dies_in_step_5)
        with pytest.raises(Killed):
            run(model_folder, text_file, tmp_path / "cut", **changes)
    resumed = run(model_folder, text_file, tmp_path / "cut", resume=True, **changes)
    want, got = weights(whole), weights(resumed)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert [{**line, "tokens_per_second": 0} for line in resumed.history] == [
        {**line, "tokens_per_second": 0} for line in whole.history
    ]


def test_a_checkpoint_cut_short_is_not_resumed_from(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    whole = run(model_folder, text_file, tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "checkpoint-8" / "manifest.json").unlink()
    (tmp_path / "out" / "checkpoints" / "checkpoint-8" / "optimizer.safetensors").write_bytes(b"half")
    assert all(
        torch.equal(w, weights(whole)[n])
        for n, w in weights(run(model_folder, text_file, tmp_path / "out", resume=True)).items()
    )


def test_ctrl_c_saves_and_says_how_to_go_on(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: cogsym.TrainResult,
) -> None:
    step = OuterTrainer.check_gradients

    def interrupted_in_step_2(self: OuterTrainer) -> None:
        step(self)
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(OuterTrainer, "check_gradients", interrupted_in_step_2)
        with pytest.raises(
            RunStopped, match="Stopped at step 2 of 8, and saved; the same command with --resume"
        ) as stop:
            run(model_folder, text_file, tmp_path / "out")
    assert stop.value.exit_status == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in RunFolder(tmp_path / "out").complete_checkpoints()] == ["checkpoint-2"]
    resumed = run(model_folder, text_file, tmp_path / "out", resume=True)
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(resumed).items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.compute_loss

    def spoiled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) * (float("nan") if self.state.global_step == 4 else 1)

    monkeypatch.setattr(Trainer, "compute_loss", spoiled)
    with pytest.raises(RunStopped, match=r"loss became nan at step 5; the last good checkpoint is .*checkpoint-3\. "):
        run(model_folder, text_file, tmp_path / "out")
    saved = load_file(RunFolder(tmp_path / "out").complete_checkpoints()[-1] / "trained.safetensors")
    assert all(w.isfinite().all() for w in saved.values())


def test_a_rate_that_makes_the_model_explode_stops(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"became (nan|inf) at step .* lower learning rate than 1e\+30"):
        run(model_folder, text_file, tmp_path / "out", learning_rate=1e30, warmup=0, steps=30)


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = OuterTrainer.check_gradients

    def spoiled(self: OuterTrainer) -> None:
        if self.state.global_step == 3:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = float("inf")
        step(self)

    monkeypatch.setattr(OuterTrainer, "check_gradients", spoiled)
    with pytest.raises(RunStopped, match=r"norm of the gradient became inf at step 4; .*checkpoint-3"):
        run(model_folder, text_file, tmp_path / "out")


def test_a_full_disk_leaves_the_old_checkpoint_intact(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: cogsym.TrainResult,
) -> None:
    original = OuterTrainer._save_optimizer_and_scheduler

    def full(self: OuterTrainer, folder: str) -> None:
        if self.state.global_step > 3:
            raise OSError(28, "No space left on device")
        original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(OuterTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            RunStopped, match=r"checkpoint at step 6 was not written .*No space left.*checkpoint-3 is intact"
        ):
            run(model_folder, text_file, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-3"]
    resumed = run(model_folder, text_file, tmp_path / "out", resume=True)
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(resumed).items())


@pytest.mark.parametrize("step", [2, 5])
def test_a_step_that_does_not_fit_into_memory(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = Trainer.compute_loss

    def full(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            torch.empty(1 << 60)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", full)
    saved = "start again with a smaller batch" if step == 2 else "checkpoint-3 is intact, go on with --resume"
    with pytest.raises(RunStopped, match=f"^Step {step} does not fit into memory; .*{saved}"):
        run(model_folder, text_file, tmp_path / "out")


def test_a_run_that_is_there_is_not_overwritten(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run(model_folder, text_file, tmp_path / "out", steps=1)
    with pytest.raises(CogsymError, match="holds a run already; continue it with --resume, or choose another --out"):
        run(model_folder, text_file, tmp_path / "out", steps=1)
    with pytest.raises(
        CogsymError, match=r"was started with steps 1 \(now 2\), seed 0 \(now 5\); resume it with the same"
    ):
        run(model_folder, text_file, tmp_path / "out", steps=2, seed=5, resume=True)
    text_file.write_text(text_file.read_text() + '{"sw": "jambo"}\n')
    with pytest.raises(CogsymError, match="was started with other data"):
        run(model_folder, text_file, tmp_path / "out", steps=1, resume=True)
    with pytest.raises(CogsymError, match=r"There is no run in .* to resume"):
        run(model_folder, text_file, tmp_path / "new", resume=True)


def test_bf16_keeps_trained_weights_in_float32_and_saves_the_original_dtype(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    step = OuterTrainer.check_gradients

    def look(self: OuterTrainer) -> None:
        seen.append({p.requires_grad: p.dtype for p in self.model.parameters()})
        step(self)

    monkeypatch.setattr(OuterTrainer, "check_gradients", look)
    result = run(model_folder, text_file, tmp_path / "out", dtype="bf16")
    assert seen[0] == {True: torch.float32, False: torch.bfloat16}
    assert {w.dtype for w in weights(result).values()} == {torch.bfloat16}
    before, after = result.bits_per_byte("sw")
    assert after < 0.8 * before


def test_full_fine_tuning_and_lora(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    source = Source(text_file, field="sw")
    everything = cogsym.train(
        model_folder, [source], tmp_path / "all", plan=LayerPlan.all(4), settings=TrainSettings(**SETTINGS)
    )
    base = load_file(model_folder / "model.safetensors")
    assert not any(torch.equal(w, base[n]) for n, w in weights(everything).items())
    lora = run(model_folder, text_file, tmp_path / "lora", lora_rank=2)
    moved = {n.split(".", 3)[2] for n, w in weights(lora).items() if not torch.equal(w, base[n])}
    assert moved == {"0", "3"}
    with pytest.raises(CogsymError, match="LoRA trains decoder layers only"):
        cogsym.train(
            model_folder, [source], tmp_path / "no", plan=LayerPlan.outer(4, final_norm=True),
            settings=TrainSettings(**SETTINGS, lora_rank=2),
        )  # fmt: skip


def test_pairs_with_the_loss_on_the_target(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    source = Source(text_file, template="{en} = {sw}")
    settings = TrainSettings(**{**SETTINGS, "loss": "target", "steps": 2})
    result = cogsym.train(model_folder, [source], tmp_path / "out", evaluate={"pairs": source}, settings=settings)
    before, after = result.bits_per_byte("pairs")
    assert after < before


def test_a_loaded_model_and_documents_at_hand(model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    documents = [Document("habari ya leo") for _ in range(40)]
    settings = TrainSettings(**{**SETTINGS, "steps": 2})
    result = cogsym.train(model, [documents], tmp_path / "out", tokenizer=tokenizer, settings=settings)
    assert result.model is model
    assert all(p.requires_grad for p in model.parameters())  # put back as they were
    with pytest.raises(CogsymError, match="a loaded model without its tokenizer"):
        cogsym.train(model, [documents], tmp_path / "other", settings=settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a number above 0"),
        ({"steps": 0}, "steps is 0, expected a whole number above 0"),
        ({"lora_rank": -1}, "lora_rank is -1, expected a whole number above 0"),
        ({"dtype": "fp8"}, "dtype is 'fp8', expected auto, bf16 or fp32"),
        ({"keep": "half"}, "keep is 'half', expected one of auto, all,"),
        ({"memory_budget": 0}, "memory_budget is 0 with keep='auto', expected a positive number of bytes"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CogsymError, match=message):
        TrainSettings(**changes)


def test_what_frozen_layers_keep_changes_no_weight_and_may_change_on_resuming(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    whole = run(model_folder, text_file, tmp_path / "all", keep="all")
    seen = []
    module = sys.modules["cogsym.training.prepare"]  # `cogsym.training.prepare` by name is the function
    original = module.run_frozen
    monkeypatch.setattr(
        module, "run_frozen", lambda *args: seen.append((args[-1], args[1].requires_grad)) or original(*args)
    )
    little = run(model_folder, text_file, tmp_path / "little", memory_budget=1)
    assert {keep for keep, gradient in seen if gradient} == {"nothing"}
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(little).items())
    shutil.rmtree(tmp_path / "all" / "checkpoints" / "checkpoint-8")
    seen.clear()
    resumed = run(model_folder, text_file, tmp_path / "all", resume=True, keep="input")
    assert {keep for keep, gradient in seen if gradient} == {"input"}
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(resumed).items())
