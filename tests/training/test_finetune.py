"""`cogsym.train` end to end on a tiny model: what it writes, resuming, and every way it can end early."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_model
from training.killed import killed_in_step
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

import cogsym
from cogsym import CogsymError, LayerPlan, RunStopped, TrainSettings, heartbeat
from cogsym.data import Document, Source, held_out, pack, read_documents, separator_id, tokenize
from cogsym.models.attachment import RECORD
from cogsym.models.loading import load_tokenizer
from cogsym.training import checkpoint
from cogsym.training.evaluate import bits_per_byte
from cogsym.training.finetune import dry_run
from cogsym.training.notices import risen
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


def test_the_model_is_on_its_device_before_weights_are_laid_beside_each_other(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[Any, bool]] = []
    to = PreTrainedModel.to

    def recorded(model: Any, *args: Any, **kwargs: Any) -> Any:
        moves.append((args, hasattr(model, RECORD)))
        return to(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "to", recorded)
    run(model_folder, text_file, tmp_path / "out", steps=1)
    expected = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert moves[0] == ((expected,), False)


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


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "schedule": "linear"}, {"lora_rank": 2}], ids=str)
def test_resuming_gives_the_weights_of_an_uninterrupted_run_bit_for_bit(
    model_folder: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run(model_folder, text_file, tmp_path / "whole", **changes)
    with killed_in_step(5):
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


@pytest.mark.usefixtures("heeded_signals")
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


def test_adapters_are_saved_beside_the_model_into_which_they_are_merged(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    merged = run(model_folder, text_file, tmp_path / "out", lora_rank=2, steps=2)
    adapter = tmp_path / "out" / "adapter"
    assert not adapter.exists()
    run(model_folder, text_file, tmp_path / "out", resume=True, lora_rank=2, steps=2, save_adapter=True)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    adapted = [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert {name.split(".layers.")[1][0] for name in adapted} == {"0", "3"}
    theirs, base = dict(loaded.merge_and_unload().named_parameters()), load_file(model_folder / "model.safetensors")
    torch.testing.assert_close(theirs, {name: weights(merged)[name] for name in theirs})
    assert any(not torch.equal(p, base[name]) for name, p in theirs.items())
    with pytest.raises(CogsymError, match=r"save_adapter is set and there are no adapters to save; set lora_rank"):
        TrainSettings(save_adapter=True)


def test_a_full_disk_leaves_the_old_checkpoint_intact(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: cogsym.TrainResult,
) -> None:
    original = checkpoint.save_optimizer

    def full(optimizer: Any, scheduler: Any, *args: Any) -> None:
        if scheduler.last_epoch > 3:
            raise OSError(28, "No space left on device")
        original(optimizer, scheduler, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_optimizer", full)
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
    with pytest.raises(
        CogsymError,
        match=r"was started with steps 1 \(now 2\), .* ends at 0 there; .* to train longer, give .*out/model",
    ):
        run(model_folder, text_file, tmp_path / "out", steps=2, resume=True)
    text_file.write_text(text_file.read_text() + '{"sw": "jambo"}\n')
    with pytest.raises(CogsymError, match="was started with other data"):
        run(model_folder, text_file, tmp_path / "out", steps=1, resume=True)
    with pytest.raises(CogsymError, match=r"There is no run in .* to resume"):
        run(model_folder, text_file, tmp_path / "new", resume=True)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_bf16_keeps_trained_weights_in_float32_and_saves_the_dtype_of_the_base(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: torch.dtype
) -> None:
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=base).save_pretrained(model_folder)
    seen = []
    step = OuterTrainer.check_gradients

    def look(self: OuterTrainer) -> None:
        seen.append({p.requires_grad: p.dtype for p in self.model.parameters()})
        step(self)

    monkeypatch.setattr(OuterTrainer, "check_gradients", look)
    result = run(model_folder, text_file, tmp_path / "out", dtype="bf16")
    assert seen[0] == {True: torch.float32, False: torch.bfloat16}
    assert_of_the_base_s_dtype_and_size(result, model_folder, base)
    before, after = result.bits_per_byte("sw")
    assert after < 0.8 * before


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_float32_saves_the_dtype_of_the_base(
    model_folder: Path, text_file: Path, tmp_path: Path, lora_rank: int | None
) -> None:
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(model_folder)
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "dtype": None}))  # as older versions wrote
    result = run(model_folder, text_file, tmp_path / "out", steps=2, lora_rank=lora_rank)
    assert_of_the_base_s_dtype_and_size(result, model_folder, torch.bfloat16)


def assert_of_the_base_s_dtype_and_size(result: cogsym.TrainResult, base: Path, dtype: torch.dtype) -> None:
    assert {w.dtype for w in (*weights(result).values(), *result.model.parameters())} == {dtype}
    name = "model.safetensors"
    assert abs((result.folder / name).stat().st_size - (base / name).stat().st_size) < 100
    assert AutoModelForCausalLM.from_pretrained(result.folder, dtype="auto").dtype == dtype


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


def test_trained_embeddings_are_recorded_saved_and_resumed(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """With the head that is tied to them; in bfloat16, where their optimizer and they themselves are float32."""
    tiny_model("llama", vocab_size=300, tie_word_embeddings=True).save_pretrained(model_folder)
    plan = LayerPlan.outer(4, embeddings=True, head=True)
    settings = TrainSettings(**{**SETTINGS, "steps": 4, "save_every": 2, "dtype": "bf16"})

    def trained(resume: bool) -> cogsym.TrainResult:
        source = Source(text_file, field="sw")
        return cogsym.train(model_folder, [source], tmp_path / "out", plan=plan, settings=settings, resume=resume)

    whole = trained(resume=False)
    record = json.loads((tmp_path / "out" / "settings.json").read_text("utf-8"))["plan"]
    assert record["embeddings"] and record["head"] and record["trained"] == [0, 3]
    want, base = weights(whole), load_file(model_folder / "model.safetensors")
    moved = {name for name, w in want.items() if not torch.equal(w.bfloat16(), base[name].bfloat16())}
    assert "model.embed_tokens.weight" in moved and not any(".layers.1." in name for name in moved)
    tied = AutoModelForCausalLM.from_pretrained(whole.folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-4")
    shutil.rmtree(whole.folder)
    resumed = weights(trained(resume=True))
    assert resumed.keys() == want.keys() and all(torch.equal(resumed[name], w) for name, w in want.items())


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
        ({"memory_budget": 0}, "memory_budget is 0 where keep is 'auto', expected a positive number of bytes"),
        ({"warmup": 2}, "warmup is 2, expected a share of the steps, from 0 to less than 1"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"hold_out": 1.0}, "hold_out is 1.0, expected a share of the text between 0 and 1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CogsymError, match=message):
        TrainSettings(**changes)


def test_a_part_of_the_text_is_held_out(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Always the same documents, none of which is learned; the evaluation is that of these documents alone."""
    tokenizer, source = load_tokenizer(model_folder), Source(text_file, "sw", weight=1.5)
    text = tokenize(source, tokenizer, "all", 0)
    rest, held = held_out(text, 0.2)
    assert set(rest.selection) | set(held.selection) == set(text.selection)
    assert not set(rest.selection) & set(held.selection) and len(held.selection) == round(
        0.2 * len(set(text.selection))
    )
    assert held_out(text, 0.2)[1].selection.tolist() == held.selection.tolist()
    result = run(model_folder, text_file, tmp_path / "out", hold_out=0.2)
    documents = [d for i, d in enumerate(read_documents(Source(text_file, "sw"))) if i in set(held.selection)]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    separator = separator_id(tokenizer)
    want = bits_per_byte(model, pack(tokenize(documents, tokenizer, "all", separator), 64, None), 2)
    assert result.bits_per_byte("held-out")[0] == pytest.approx(want, rel=1e-5)
    with pytest.raises(CogsymError, match=r"has 1 document, expected two or more to hold 0\.2 of them out"):
        held_out(tokenize([Document("moja")], tokenizer, "all", 0), 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 512}, "length is 512 tokens, expected at most the model's context, "),
        ({"eval_every": 2}, r"eval_every is 2 and there is no held-out text; give some \(--eval\)"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_text(
    model_folder: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings, source = TrainSettings(**{**SETTINGS, **changes}), Source(text_file, field="sw")
    with pytest.raises(CogsymError, match=message):
        cogsym.train(model_folder, [source], tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_what_is_taken_and_may_not_be_meant_is_warned_of(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def said(name: str, **changes: Any) -> str:
        console = Console(file=StringIO(), width=999)
        settings = TrainSettings(**(SETTINGS | {"steps": 4} | changes))
        source = Source(text_file, field="sw")
        cogsym.train(model_folder, [source], tmp_path / name, settings=settings, console=console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert "Warning" not in said("plain")
    warned = said("little", memory_budget=1000)
    assert "Warning: the memory budget (--memory) is 0.0 MiB and frozen layers hold" in warned
    assert "the best of four were" in said("default", learning_rate=TrainSettings().learning_rate)
    grew = said("in its last step", steps=1, warmup=0, learning_rate=1e9)
    assert "Warning: the trained weights grew from at most" in grew and "lower learning rate" in grew


def test_a_loss_that_has_risen_is_warned_of() -> None:
    history = [{"loss": 3.1}, {"loss": 9.75}, {"eval_sw_bits_per_byte": 4.0}]
    warned = risen(3.0, history, 1e9)
    assert warned and warned.startswith("Warning: the loss rose from 3 to 9.75, so the model has learned nothing")
    assert "lower learning rate (--learning-rate) than 1e+09." in warned
    assert risen(9.5, history, 1e9) is None and risen(3.0, [], 1e9) is None


def test_a_dry_run_says_what_a_run_costs(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=999)
    settings, source = TrainSettings(**(SETTINGS | {"hold_out": 0.1})), Source(text_file, field="sw")
    dry_run(model_folder, [source], tmp_path / "out", settings=settings, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()
    assert "tokens: 1,024 in 8 steps\n" in said
    assert re.search(r"time: about \d+ s, [\d,]+ tokens/s; evaluation \d+ s of it\n", said)
    assert re.search(r"memory: about \d\.\d\d GB at its peak\ndisk: 0\.00 GB, of it 0\.00 GB for the model\n", said)


def test_a_line_a_minute_where_no_terminal_shows_a_bar(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One when it begins, after the first step and at the end; others as time goes by, not as steps do."""
    monkeypatch.setattr(heartbeat, "SECONDS", 0.3)
    step = OuterTrainer.check_gradients
    monkeypatch.setattr(OuterTrainer, "check_gradients", lambda self: (time.sleep(0.5), step(self)))
    console = Console(file=StringIO(), width=999)
    settings, source = TrainSettings(**(SETTINGS | {"steps": 3})), Source(text_file, field="sw")
    cogsym.train(model_folder, [source], tmp_path / "out", settings=settings, console=console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    begun = lines.index("training begins: 3 steps, a line a minute")
    rest = lines[begun + 1 :]
    assert rest[0] == "step 0/3, the first is being computed"
    line = r"step [123]/3, loss \d\.\d+, [\d,]+ tokens/s, \d:\d\d elapsed"
    assert all(re.fullmatch(rf"{line}(, \d:\d\d left)?", text) for text in rest if not text.startswith("step 0/3"))
    assert sum(text.startswith("step 1/3") for text in rest) >= 2 and "step 3/3" in rest[-1]


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


def test_a_run_learns_what_the_assistant_says(model_folder: Path, tmp_path: Path) -> None:
    """A two-turn chat, its questions random: bits per byte of its answers fall, and a resumed run is the same run."""
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(model_folder)
    path = tmp_path / "chats.jsonl"
    first, second = ({"role": "assistant", "content": text} for text in ("habari za leo", "mama anapika"))
    asked = [{"role": "user", "content": f"{n * 37 % 100}"} for n in range(20)]
    rows = [[question, first, question, second] for question in asked]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
    source = Source(path, chat="messages")

    def train(resume: bool, source: Source) -> cogsym.TrainResult:
        settings = TrainSettings(**SETTINGS)
        return cogsym.train(
            model_folder, [source], tmp_path / "out", evaluate={"c": source}, settings=settings, resume=resume
        )

    before, after = train(False, source).bits_per_byte("c")
    assert after < 0.7 * before
    assert train(True, source).steps == 8
    assert "chat_template" in "".join(p.name for p in (tmp_path / "out" / "model").iterdir())
    with pytest.raises(CogsymError, match="other data"):
        train(True, Source(path, chat="messages", weight=2))
