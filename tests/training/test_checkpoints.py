"""Checkpoints are whole or they are not used, and nothing in them can do anything but be read."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import cogsym
from cogsym import CogsymError, RunStopped, TrainSettings
from cogsym.data import Source
from cogsym.records import damage
from cogsym.training import checkpoint as module
from cogsym.training import run_folder
from cogsym.training.checkpoint import FILES
from cogsym.training.run_folder import RunFolder

SETTINGS: dict[str, Any] = {
    "length": 64, "batch_size": 2, "steps": 6, "learning_rate": 1e-2, "dtype": "fp32", "save_every": 2, "log_every": 1,
}  # fmt: skip


def run(model: Path, text: Path, out: Path, resume: bool = False, **changes: Any) -> tuple[cogsym.TrainResult, str]:
    """The run, and what it said."""
    console = Console(file=io.StringIO(), width=400)
    settings = TrainSettings(**{**SETTINGS, **changes})
    result = cogsym.train(model, [Source(text, field="sw")], out, settings=settings, resume=resume, console=console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def whole(_model_folder: Path, _text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    return run(_model_folder, _text_file, tmp_path_factory.mktemp("whole") / "out")[0].folder.parent


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of it as after its last checkpoint, whose model was not written yet."""
    copy = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.rmtree(copy / "model")
    return copy


def lines(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "tokens_per_second"} for line in read]


def assert_same(folder: Path, whole: Path) -> None:
    want, got = (load_file(f / "model" / "model.safetensors") for f in (whole, folder))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert lines(folder) == lines(whole)


def newest(folder: Path) -> Path:
    return RunFolder(folder).complete_checkpoints()[-1]


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def zeroed(path: Path, chance: random.Random) -> None:
    """As a file system leaves what was not on the disk when the power went."""
    path.write_bytes(bytes(path.stat().st_size))


def removed(path: Path, chance: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [flip, cut, zeroed, removed])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path, name: str, harm: Callable[..., None]
) -> None:
    assert [p.name for p in RunFolder(out).complete_checkpoints()] == ["checkpoint-4", "checkpoint-6"]
    seed = random.randrange(10**6)
    print("seed", seed)
    harm(newest(out) / name, random.Random(seed))
    _, said = run(_model_folder, _text_file, out, resume=True)
    assert re.search(
        rf"checkpoint-6 is damaged \({re.escape(name)} [^\n]*\) and not used; going on from checkpoint-4\.", said
    ), said
    assert_same(out, whole)
    assert not damage(newest(out)) and newest(out).name == "checkpoint-6"


def test_a_run_that_was_at_its_end_trains_no_step_more(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path
) -> None:
    """It was killed after its last checkpoint and before its model was written; Trainer alone takes a step 7 of 6."""
    result, said = run(_model_folder, _text_file, out, resume=True)
    assert result.steps == 6
    assert "The run is finished, at step 6 of 6; nothing is left to train." in said
    assert_same(out, whole)


def test_the_first_whole_one_of_several_and_none(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path, tmp_path: Path
) -> None:
    (out / "checkpoints/checkpoint-6/trained.safetensors").unlink()
    shutil.copytree(out, tmp_path / "none")
    shutil.copytree(out / "checkpoints/checkpoint-4", out / "checkpoints/checkpoint-5")
    (out / "checkpoints/checkpoint-5/random.json").write_text("{}")
    _, said = run(_model_folder, _text_file, out, resume=True)
    assert "checkpoint-6 is damaged" in said and "checkpoint-5 is damaged" in said
    assert "not used; going on from checkpoint-4." in said
    assert_same(out, whole)
    (tmp_path / "none/checkpoints/checkpoint-4/manifest.json").unlink()
    _, said = run(_model_folder, _text_file, tmp_path / "none", resume=True)
    assert "checkpoint-4 is damaged (manifest.json is missing) and not used; beginning at step 0." in said
    assert_same(tmp_path / "none", whole)


def test_a_manifest_is_written_last_with_everything_on_the_disk(
    _model_folder: Path, _text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    run(_model_folder, _text_file, tmp_path / "out", steps=2)
    checkpoint = newest(tmp_path / "out")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["files"].keys() == {p.name for p in checkpoint.iterdir()} - {"manifest.json"}
    assert {*FILES} == {p.name for p in checkpoint.iterdir()}
    assert set(FILES) <= set(synced)
    begin = min(i for i, name in enumerate(synced) if name in FILES)
    end = max(i for i, name in enumerate(synced) if name in FILES)
    assert {*FILES} == set(synced[begin : end + 1])
    assert synced[end + 1].startswith("checkpoint-2.") and synced[end + 2] == "checkpoints"


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name", ["scaler.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"]
)
def test_what_the_run_did_not_write_is_neither_read_nor_removed(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    stray = newest(out) / name
    stray.write_bytes(pickle.dumps(Exploit(tmp_path / "executed")))
    before = stray.read_bytes()
    _, said = run(_model_folder, _text_file, out, resume=True)
    assert f"checkpoint-6 holds {name}, which the run did not write: it is not read." in said
    assert not (tmp_path / "executed").exists()
    assert_same(out, whole)
    assert stray.read_bytes() == before


def test_nothing_is_pickled(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refused)
    (out / "checkpoints/checkpoint-6/manifest.json").unlink()
    run(_model_folder, _text_file, out, resume=True)
    assert_same(out, whole)


def test_an_older_checkpoint_with_something_of_a_users_stays(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path
) -> None:
    note = out / "checkpoints/checkpoint-4/notes.txt"
    note.write_text("mine")
    run(_model_folder, _text_file, out, resume=True, steps=6)
    shutil.rmtree(out / "model")
    (out / "checkpoints/checkpoint-6/notes.txt").write_text("mine")
    (out / "checkpoints/checkpoint-6/trained.safetensors").unlink()
    with pytest.raises(RunStopped, match=r"checkpoint-6/notes\.txt is in its place and not of this run; move it away"):
        run(_model_folder, _text_file, out, resume=True)
    assert (out / "checkpoints/checkpoint-6/notes.txt").read_text() == note.read_text() == "mine"
    (out / "checkpoints/checkpoint-6/notes.txt").unlink()
    run(_model_folder, _text_file, out, resume=True)
    assert_same(out, whole)


def test_one_that_cannot_be_read_is_not_called_damaged(
    _model_folder: Path, _text_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(run_folder, "damage", full)
    with pytest.raises(CogsymError, match=r"checkpoint-6 cannot be read \(Too many open files\); mend that and run"):
        run(_model_folder, _text_file, out, resume=True)
    assert len(list((out / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("harm", [flip, cut, zeroed])
def test_settings_and_metrics_are_repaired(
    _model_folder: Path, _text_file: Path, out: Path, whole: Path, harm: Callable[..., None]
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    harm(out / "settings.json", chance)
    harm(out / "metrics.jsonl", chance)
    run(_model_folder, _text_file, out, resume=True)
    assert_same(out, whole)
    assert (out / "settings.json").read_bytes() == (whole / "settings.json").read_bytes()


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))

    draw()  # an odd number, so that the second half of a pair is kept
    module.save_random(tmp_path / "random.json")
    want = [draw() for _ in range(5)]
    module.load_random(tmp_path / "random.json")
    assert [draw() for _ in range(5)] == want
