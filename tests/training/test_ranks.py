"""`cogsym train` on two ranks: the losses and files of one process, ended by a signal, resumed on another number."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Launched, sentences
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cogsym
from cogsym import CogsymError, TrainSettings
from cogsym.data import Source
from cogsym.training.shares import SharedOrder, SharedRows, shared_batch

ROWS = 4  # a step


@pytest.fixture
def steady(model_folder: Path) -> Path:
    """The tiny model without dropout, of which each rank would draw its own."""
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return model_folder


def alone(model: Path, text: Path, out: Path, resume: bool = False, **changes: Any) -> cogsym.TrainResult:
    """Of one process, the rows of a step in one batch."""
    options: dict[str, Any] = {"length": 64, "batch_size": ROWS, "learning_rate": 2e-3, "dtype": "fp32"} | changes
    settings, source = TrainSettings(**options), Source(text, field="sw")
    return cogsym.train(model, [source], out, evaluate={"news-sw": source}, settings=settings, resume=resume)


def words(model: Path, text: Path, out: Path) -> list[object]:
    """The same on the command line, half the rows of a step for each of two ranks."""
    source = f"{text}#sw"
    named = {"data": source, "eval": source, "out": out, "length": 64, "batch-size": ROWS // 2}
    options = [part for n, v in (named | {"learning-rate": 2e-3, "dtype": "fp32"}).items() for part in (f"--{n}", v)]
    return ["train", model, *options]


def files(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def assert_same_run(one: cogsym.TrainResult, out: Path) -> None:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(one.history)
    for line, wanted in zip(lines, one.history, strict=True):
        line.pop("tokens_per_second", None)
        assert line == pytest.approx({n: v for n, v in wanted.items() if n != "tokens_per_second"}, rel=1e-3)
    for name, weight in load_file(one.folder / "model.safetensors").items():
        torch.testing.assert_close(load_file(out / "model" / "model.safetensors")[name], weight, rtol=1e-2, atol=1e-3)


def test_two_ranks_do_what_one_process_does(steady: Path, text_file: Path, tmp_path: Path) -> None:
    """In two epochs of rows that two ranks cannot share out evenly."""
    one = alone(steady, text_file, tmp_path / "one", epochs=2, save_every=3)
    asked = [*words(steady, text_file, tmp_path / "two"), "--epochs", 2, "--save-every", 3]
    status, out, said = Launched(*asked).end()
    assert status == 0, said
    assert out.count("bits per byte before") == out.count("The model is in") == 1
    assert said.count("training begins") == 1 and "2 ranks, 2 rows each a forward pass, 4 rows a step\n" in said
    assert one.history[-1]["tokens"] < one.steps * ROWS * 64  # the last step of an epoch has fewer rows
    assert_same_run(one, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")

    status, out, said = Launched(*asked, console_script=True).end()
    assert status != 0 and not out
    assert said.count("holds a run already; continue it with --resume, or choose another --out.\n") == 1
    assert sentences(said) == 1


def test_a_signal_to_one_rank_ends_both_and_one_process_goes_on(steady: Path, text_file: Path, tmp_path: Path) -> None:
    one = alone(steady, text_file, tmp_path / "one", steps=100)
    launched = Launched(*words(steady, text_file, tmp_path / "two"), "--steps", 100)
    metrics, rank = tmp_path / "two" / "metrics.jsonl", launched.rank(1)
    launched.wait_until(lambda: metrics.exists() and '"step": 10' in metrics.read_text())
    os.kill(rank, signal.SIGTERM)
    status, _, said = launched.end()
    assert status != 0 and "cogsym: Stopped at step " in said and sentences(said) == 1
    two = alone(steady, text_file, tmp_path / "two", resume=True, batch_size=ROWS // 2, steps=100)
    assert two.steps == 100
    # The line of the ten steps in which it stopped says the mean loss of those after.
    assert two.history[-1]["tokens"] == one.history[-1]["tokens"]
    assert two.bits_per_byte("news-sw") == pytest.approx(one.bits_per_byte("news-sw"), rel=1e-3)
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["ranks"] == 2


def test_ranks_that_share_the_weights_do_what_one_process_does(steady: Path, text_file: Path, tmp_path: Path) -> None:
    one, out = alone(steady, text_file, tmp_path / "one", steps=4), tmp_path / "two"
    status, told, said = Launched(*words(steady, text_file, out), "--steps", 4, "--fsdp").end()
    assert status == 0, said
    assert told.count("The model is in") == 1
    bytes_here, bytes_in_all = map(int, re.findall(r"holds (\d+) of (\d+) bytes", said.replace(",", ""))[0])
    assert bytes_here == bytes_in_all / 2
    assert_same_run(one, out)
    assert files(out) == files(tmp_path / "one")
    written = load_file(out / "model" / "model.safetensors")
    again = alone(steady, text_file, out, resume=True, batch_size=ROWS // 2, steps=4)  # from its last checkpoint
    assert all(torch.equal(weight, written[n]) for n, weight in load_file(again.folder / "model.safetensors").items())


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(
    steady: Path, text_file: Path, tmp_path: Path
) -> None:
    """From a checkpoint of ranks that each held the whole model, on ranks that hold it in parts; with adapters."""
    options: dict[str, Any] = {"steps": 40, "save_every": 10, "lora_rank": 2}
    one, out = alone(steady, text_file, tmp_path / "one", **options), tmp_path / "two"
    asked = [*words(steady, text_file, out), "--steps", 40, "--save-every", 10, "--lora-rank", 2]
    launched = Launched(*asked)
    rank = launched.rank(1)
    launched.wait_until(lambda: (out / "checkpoints" / "checkpoint-10").exists())
    os.kill(rank, signal.SIGKILL)
    status, _, said = launched.end()
    assert status != 0 and "cogsym: Another rank of this run has ended; what was written is whole" in said
    assert sentences(said) == 1
    status, _, said = Launched(*asked, "--resume", "--fsdp", "--save-adapter").end()
    assert status == 0, said
    assert_same_run(one, out)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(steady), out / "adapter")
    merged = dict(adapted.merge_and_unload().named_parameters())
    written = load_file(out / "model" / "model.safetensors")
    torch.testing.assert_close(merged, {n: written[n] for n in merged})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"The setting fsdp is set, which shares the weights out among ranks, and this process is alone; start it"),
        ({"stream": True}, r"fsdp is set, which shards weights in memory as they are; leave stream and"),
        ({"frozen_weights": "int8"}, r"leave stream and frozen_weights out"),
    ],
)
def test_weights_that_cannot_be_shared_out(
    steady: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CogsymError, match=words):
        alone(steady, text_file, tmp_path / "out", fsdp=True, **changes)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "began_as", "size", "expected"),
    [(4, 1, 2, 2, (4, 1)), (4, 1, 2, 1, (4, 2)), (4, 1, 1, 2, (2, 1)), (6, 3, 1, 2, (3, 3)), (1, 2, 3, 2, (1, 3))],
)
def test_resumed_on_other_ranks_a_step_has_the_same_rows(
    batch_size: int, accumulation: int, began_as: int, size: int, expected: tuple[int, int]
) -> None:
    settings = TrainSettings(batch_size=batch_size, accumulation=accumulation)
    assert shared_batch(settings, began_as, size) == expected


def test_ranks_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(CogsymError, match=r"has 4 rows a step, which 3 ranks cannot share out evenly; resume it on"):
        shared_batch(TrainSettings(batch_size=4), 1, 3)


def test_every_row_is_seen_once_and_blank_rows_fill_up() -> None:
    row = {"labels": torch.tensor([-100, 3]), "input_ids": torch.tensor([2, 3])}
    rows: Any = [row] * 5
    shared = SharedRows(rows, 4)
    order = SharedOrder(shared)
    torch.manual_seed(0)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append([*order])
    assert [sorted(indices) for indices in epochs] == [list(range(8))] * 3
    assert epochs[0] == epochs[2] != epochs[1] and epochs[0][5:] == [5, 6, 7]
    assert shared[4] is row and shared[7]["labels"].tolist() == [-100, -100]
