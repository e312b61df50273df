"""A run writes only into a folder that is empty or its own, alone, and changes nothing that is not its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import in_child
from safetensors.torch import load_file

import cogsym
from cogsym import CogsymError, RunStopped, TrainSettings
from cogsym.data import Source
from cogsym.training.trainer import OuterTrainer

SETTINGS: dict[str, Any] = {
    "length": 64, "batch_size": 2, "steps": 4, "learning_rate": 1e-2, "dtype": "fp32", "save_every": 2, "log_every": 1,
}  # fmt: skip


def run(model: Path, text: Path, out: Path, resume: bool = False, **changes: Any) -> cogsym.TrainResult:
    settings = TrainSettings(**{**SETTINGS, **changes})
    return cogsym.train(model, [Source(text, field="sw")], out, settings=settings, resume=resume)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, and every link, with a digest of what it holds."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


def refused(sentence: str, *args: Any, **changes: Any) -> None:
    with pytest.raises(CogsymError) as error:
        run(*args, **changes)
    assert re.search(sentence, str(error.value)), error.value
    assert "\n" not in str(error.value)


def at_step(step: int, do: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in a step of the run."""
    check = OuterTrainer.check_gradients

    def checked(self: OuterTrainer) -> None:
        check(self)
        if self.state.global_step == step:
            do()

    monkeypatch.setattr(OuterTrainer, "check_gradients", checked)


def test_a_project_with_its_own_model_and_checkpoints_is_left_alone(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    project = tmp_path / "proj"
    checkpoint = project / "checkpoints" / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weeks of work")
    shutil.copytree(model_folder, project / "model")
    before = tree(project)
    refused(r"The input .*proj/model lies in .*proj, where the run writes; choose another --out\.", project / "model",
            text_file, project)  # fmt: skip
    refused(r"proj holds checkpoints, which no run of cogsym wrote; choose an empty or a new folder", model_folder,
            text_file, project)  # fmt: skip
    refused("There is no run in .* to resume", model_folder, text_file, project, resume=True)
    assert tree(project) == before


@pytest.mark.parametrize("name", ["notes.txt", "model/config.json", "checkpoints/checkpoint-1/optimizer.pt", ".hidden"])
def test_a_folder_that_is_not_empty_is_not_written_to(
    model_folder: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    refused(f"out holds {name.partition('/')[0]}, which no run of cogsym wrote", model_folder, text_file, out)
    assert list(tree(out)) == [name]


def test_an_empty_folder_will_do(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run(model_folder, text_file, tmp_path / "link", steps=1).folder.is_dir()
    assert (tmp_path / "empty" / "settings.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"editor.tabSize": 4}', '{"model": "m", "plan": {}}'])
def test_settings_of_something_else(model_folder: Path, text_file: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(content)
    before = tree(out)
    for resume in (False, True):
        refused(r"settings\.json is not that of a run of cogsym, or is damaged", model_folder, text_file, out, resume)
    assert tree(out) == before


def test_an_input_in_the_folder_that_is_written(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model_folder, text_file, out, steps=1)
    before = tree(out)
    inside = Path(shutil.copy(text_file, out / "more.jsonl"))
    for model, text in ((out / "model", text_file), (model_folder, inside), (model_folder, out / "." / "more.jsonl")):
        refused("lies in .*out, where the run writes", model, text, out, resume=True)
    (tmp_path / "link").symlink_to(out)
    refused("lies in .*link, where the run writes", tmp_path / "link" / "model", text_file, tmp_path / "link", True)
    refused("lies in .*base, where the run writes", model_folder, text_file, model_folder)
    source = Source(inside, field="sw")
    with pytest.raises(CogsymError, match=r"more\.jsonl lies in .*out, where the run writes"):
        cogsym.train(model_folder, [Source(text_file, field="sw")], out, evaluate={"held out": source}, resume=True)
    inside.unlink()
    assert tree(out) == before


def test_a_folder_that_is_read_is_not_written_to(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_json(str(text_file)).save_to_disk(tmp_path / "texts")
    before = tree(tmp_path / "texts")
    refused("texts/run lies in .*texts, which the run reads", model_folder, tmp_path / "texts", tmp_path / "texts/run")
    assert tree(tmp_path / "texts") == before


@pytest.mark.parametrize(
    "name", ["model", "checkpoints", "checkpoints/checkpoint-4", "metrics.jsonl", "loss.png", "settings.json"]
)
def test_links_in_the_place_of_what_a_run_wrote(model_folder: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run(model_folder, text_file, out)
    (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    before = tree(tmp_path)
    refused(f"{name} is a symbolic link, expected what the run wrote there itself", model_folder, text_file, out, True)
    assert tree(tmp_path) == before


def test_what_a_user_put_beside_the_model_stays(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model_folder, text_file, out)
    (out / "model" / "notes.txt").write_text("mine")
    (out / "notes.tmp").write_text("mine too")
    with pytest.raises(RunStopped, match=r"model/notes\.txt is in its place and not of this run; move it away and"):
        run(model_folder, text_file, out, resume=True)
    assert (out / "model" / "notes.txt").read_text() == "mine" and (out / "notes.tmp").read_text() == "mine too"
    (out / "model" / "notes.txt").rename(tmp_path / "notes.txt")
    run(model_folder, text_file, out, resume=True)


def test_a_folder_that_vanishes(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    at_step(2, lambda: shutil.rmtree(out), monkeypatch)
    with pytest.raises(RunStopped, match=r"The folder .*out is gone, and the run with it; start again with another"):
        run(model_folder, text_file, out)
    assert not out.exists()


def test_checkpoints_whose_folder_cannot_be_made(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder became read-only behind the first file that was written there."""
    mkdir = os.mkdir

    def refused(path: Any, *args: Any, **more: Any) -> None:
        if Path(path).name == "checkpoints":
            raise PermissionError(13, "Permission denied")
        mkdir(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(CogsymError, match=r"The folder .*out cannot be written \(Permission denied\)"):
        run(model_folder, text_file, tmp_path / "out")


def test_metrics_that_cannot_be_written(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(3, lambda: ((out / "metrics.jsonl").unlink(), (out / "metrics.jsonl").mkdir()), patch)
        with pytest.raises(RunStopped, match=r"metrics\.jsonl was not written \(Is a directory\); free some space and"):
            run(model_folder, text_file, out)
    (out / "metrics.jsonl").rmdir()
    assert run(model_folder, text_file, out, resume=True).steps == 4


def test_a_run_that_was_paused_and_overtaken_writes_no_more(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder was removed, and another run has begun in a new one of the same name."""
    out, other = tmp_path / "out", []

    def overtaken() -> None:
        if not other:  # the other run gets here too
            other.append(out)
            shutil.rmtree(out)
            run(model_folder, text_file, out, seed=1)
            other.append(tree(out))

    at_step(2, overtaken, monkeypatch)
    with pytest.raises(RunStopped, match=r"out was replaced while the run was writing to it, so nothing more is"):
        run(model_folder, text_file, out)
    assert other == [out, tree(out)]


def test_two_runs_in_one_folder(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def second() -> None:
        before = tree(out)
        refused("Another run is writing to .*out; wait for it, or choose another --out", model_folder, text_file, out,
                resume=True)  # fmt: skip
        assert in_child(
            lambda: refused("Another run is writing", model_folder, text_file, out, resume=True)
        ) == 0  # fmt: skip
        assert tree(out) == before

    with monkeypatch.context() as patch:
        at_step(2, second, patch)
        alone = run(model_folder, text_file, out)
    undisturbed = run(model_folder, text_file, tmp_path / "other")
    want, got = (load_file(result.folder / "model.safetensors") for result in (undisturbed, alone))
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert [line["step"] for line in alone.history] == [1, 2, 3, 4]


def test_a_killed_run_lets_go_of_its_folder(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
        assert in_child(lambda: run(model_folder, text_file, out)) == -signal.SIGKILL
    (out / "settings.json.0123abcd.tmp").write_text("half")
    (out / "model.0123abcd.tmp").mkdir()
    assert run(model_folder, text_file, out, resume=True).steps == 4
    assert not list(out.glob("*.tmp"))


def test_killed_before_anything_was_written(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.lock").touch()
    (out / "settings.json.0123abcd.tmp").write_text("half")
    assert run(model_folder, text_file, out, steps=1).steps == 1
    assert not list(out.glob("*.tmp"))


def test_a_run_of_an_earlier_version_goes_on(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Its settings.json is this, without a checksum, its folder has no lock, its checkpoints have no manifest."""
    out = tmp_path / "out"
    run(model_folder, text_file, out)
    record = json.loads((out / "settings.json").read_text())
    (digest,) = record["data"]
    assert re.fullmatch(r"[0-9a-f]{64} sw None 1\.0", digest)
    earlier = {
        "model": str(model_folder),
        "plan": {"num_layers": 4, "trained": [0, 3], "embeddings": False, "head": False, "final_norm": False},
        "settings": {
            "length": 64, "batch_size": 2, "accumulation": 1, "epochs": 1.0, "steps": 4, "learning_rate": 0.01,
            "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0, "dtype": "fp32",
            "lora_rank": None, "keep": "auto", "memory_budget": None, "loss": "all", "separator": None,
            "eval_every": None, "save_every": 2, "log_every": 1, "seed": 0,
        },
        "data": [digest],
    }  # fmt: skip
    (out / "settings.json").write_text(json.dumps(earlier, indent=1) + "\n")
    (out / "train.lock").unlink()
    whole = load_file(out / "model" / "model.safetensors")
    shutil.rmtree(out / "model")
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
        (checkpoint / "settings.json").unlink()
    result = run(model_folder, text_file, out, resume=True)
    got = load_file(result.folder / "model.safetensors")
    assert result.steps == 4 and all(torch.equal(whole[name], got[name]) for name in whole)
