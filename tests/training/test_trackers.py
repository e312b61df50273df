"""Numbers sent to a tracker as well, by Trainer's own callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import Done

import cogsym as package
from cogsym import TrainSettings
from cogsym.data import Source
from cogsym.training import arguments

SETTINGS: dict[str, Any] = {"length": 64, "batch_size": 2, "steps": 2, "dtype": "fp32", "log_every": 1}


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = Source(text_file, field="sw")
    settings = TrainSettings(**SETTINGS, report_to="tensorboard")
    result = package.train(model_folder, [source], tmp_path / "out", evaluate={"sw": source}, settings=settings)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for tag, key in (("train/loss", "loss"), ("eval/sw_bits_per_byte", "eval_sw_bits_per_byte")):
        wanted = [(line["step"], line[key]) for line in result.history if key in line]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, pytest.approx(value)) for step, value in wanted
        ]


def test_another_tracker_is_trainer_s_own_callback(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            assert args.run_name == "out"
            logged.append(logs)

    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["trackio"])
    monkeypatch.setitem(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    settings = TrainSettings(**SETTINGS, report_to="trackio")
    result = package.train(model_folder, [Source(text_file, field="sw")], tmp_path / "out", settings=settings)
    assert [line["loss"] for line in logged if "loss" in line] == [line["loss"] for line in result.history]
    assert not (tmp_path / "out" / "runs").exists()


def test_a_tracker_that_is_not_installed(
    cogsym: Callable[..., Done], complaint: Callable[..., str], model_folder: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    args = ["train", model_folder, "--data", f"{text_file}#sw", "--out", tmp_path / "out"]
    line = complaint(*args, "--report-to", "wandb")
    assert line == "cogsym: --report-to is wandb, which is not installed; `pip install wandb` does that."
    done = cogsym(*args, "--report-to", "paper")
    assert done.returncode == 2 and "tensorboard" in done.stderr
