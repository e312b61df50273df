"""What the GPU script asks runs to its end at a tiny size; and whatever a case does, no other's result is lost."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cogsym.bench import gpu, method, ops, overhead, parity, report, sampled, supervised, train
from cogsym.bench.case import OURS, Case, CaseSpec, Setting
from cogsym.bench.loops import LOOPS
from cogsym.bench.method import Variant
from cogsym.bench.supervised import Stage, Turn
from cogsym.bench.trainers import COMPETITORS

SETTING = Setting(("tiny",), torch.device("cpu"), full=True)
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class CompilationError(Exception):
    """Of a kind of its own, as Triton's are."""


def fails(error: BaseException) -> Case:
    raise error


def ends_with(signal_number: int) -> Case:
    faulthandler.disable()
    os.kill(os.getpid(), signal_number)
    return Case()


def hangs() -> Case:
    time.sleep(600)
    return Case()


def works(value: int) -> Case:
    return Case({OURS: Variant(lambda: None)}, facts={"value": value})


def table(lines: list[Any]) -> report.Table:
    return ["case", "value"], [[line["name"], str(line["facts"]["value"])] for line in lines]


FAULTS: dict[str, Callable[[], Case]] = {
    "first": partial(works, 1),
    "an error": partial(fails, ValueError("wrong")),
    "no memory": partial(fails, torch.OutOfMemoryError("CUDA out of memory")),
    "a compiler's": partial(fails, CompilationError("at 1:1")),
    "an exit": partial(fails, SystemExit(3)),
    "a crash": partial(ends_with, signal.SIGSEGV),
    "killed": partial(ends_with, signal.SIGKILL),
    "hangs": hangs,
    "too large": partial(works, 2),
    "last": partial(works, 3),
}
EXPECTED = {
    "an error": "ValueError: wrong",
    "no memory": "OutOfMemoryError: CUDA out of memory",
    "a compiler's": "CompilationError: at 1:1",
    "an exit": "SystemExit: 3",
    "a crash": f"its process was lost, exit status {-signal.SIGSEGV}",
    "killed": f"its process was lost, exit status {-signal.SIGKILL}",
    "hangs": "its process was ended after 1 seconds without an answer",
}


def stages(limit: float, names: tuple[str, ...] = tuple(FAULTS)) -> list[Stage]:
    turns = [Turn(CaseSpec(name, FAULTS[name], rounds=1), 1e18 if name == "too large" else 0) for name in names]
    after = [Turn(CaseSpec("another stage", partial(works, 4), rounds=1))]
    return [Stage("one", SETTING, turns, table, limit=limit), Stage("two", SETTING, after, table)]


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are there at once, with what a test has patched; no GPU is used."""
    monkeypatch.setattr(supervised, "CONTEXT", multiprocessing.get_context("fork"))


def test_no_fault_takes_another_result_with_it(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def say(line: str) -> None:
        if ": " in line and (tmp_path / "one.json").exists():
            seen.append([case["name"] for case in report.read(tmp_path / "one.json")["cases"]])

    assert not supervised.run(partial(stages, 1.0), tmp_path, "the command", 120.0, say)
    one, two = (report.read(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert {line["name"]: line["facts"]["value"] for line in one["cases"]} == {"first": 1, "last": 3}
    assert {name: failure["error"] for name, failure in one["failed"].items()} == EXPECTED
    assert "raise error" in one["failed"]["an error"]["traceback"]
    assert list(one["left_out"]) == ["too large"] and "1000000000 GB of memory" in one["left_out"]["too large"]
    assert one["command"] == "the command" and one["machine"]["torch"] == torch.__version__
    assert [line["name"] for line in two["cases"]] == ["another stage"] and not two["failed"]
    assert seen[0] == ["first"], "the file is there as soon as its first case is"
    tables = (tmp_path / supervised.TABLES).read_text()
    assert "| last | 3 |" in tables and "- failed: hangs: its process" in tables and "- left out: too large" in tables


def test_the_clock_is_kept(tmp_path: Path) -> None:
    started = time.perf_counter()
    names = ("first", "hangs", "last")
    assert not supervised.run(partial(stages, 600.0, names), tmp_path, "", 3.0, lambda line: None)
    assert time.perf_counter() - started < 6
    one, two = (report.read(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert [line["name"] for line in one["cases"]] == ["first"]
    assert list(one["failed"]) == ["hangs"]
    assert one["left_out"] == {"last": "its turn came after 3 seconds"}
    assert list(two["left_out"]) == ["another stage"] and not two["cases"]


def test_a_gpu_that_is_spoilt_is_left_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def release(device: torch.device) -> None:
        if not (tmp_path / "spoilt").exists():
            (tmp_path / "spoilt").write_text(str(os.getpid()))
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(method, "release", release)
    assert not supervised.run(partial(stages, 9.0, ("first", "last")), tmp_path, "", 60.0, lambda line: None)
    one = report.read(tmp_path / "one.json")
    assert one["failed"]["first"]["error"].startswith("afterwards: RuntimeError: an illegal memory access")
    assert one["failed"]["first"]["line"]["facts"] == {"value": 1}
    assert [line["name"] for line in one["cases"]] == ["last"]


def test_a_machine_on_which_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "_serve", lambda *_: sys.exit(7))
    monkeypatch.setattr(supervised, "STARTS", 1)
    assert not supervised.run(partial(stages, 9.0, ("first", "last")), tmp_path, "", 60.0, lambda line: None)
    one = report.read(tmp_path / "one.json")
    assert one["failed"]["first"]["error"] == "its process was lost, exit status 7"
    assert one["left_out"] == {"last": "1 processes in a row could not be started"}


def test_a_table_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    def make() -> list[Stage]:
        turn = Turn(CaseSpec("x", lambda: Case({OURS: Variant(lambda: None)}), rounds=1))
        return [Stage("odd", SETTING, [turn], table)]

    assert supervised.run(make, tmp_path, "", 60.0, lambda line: None)
    assert "- no table of x: KeyError: 'value'" in (tmp_path / supervised.TABLES).read_text()


def test_everything_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage at a tiny shape, in this process: each has a line for every case, and every check is right."""
    monkeypatch.setattr(train, "COMPETITORS", COMPETITORS[:3])
    monkeypatch.setattr(sampled, "LOOPS", LOOPS[:1])
    monkeypatch.setattr(method, "LEAST_ROUNDS", 1)
    one = {"rms_norm": ops.examples()["rms_norm"]}
    for module in (ops, overhead, parity):
        monkeypatch.setattr(module, "examples", lambda: one)
    lines: dict[str, list[Any]] = {}
    for stage in gpu.stages("cpu", tiny=True):
        for turn in stage.turns if stage.name == "parity" else stage.turns[:1]:
            reply = supervised.perform(stage, turn, 0.0)
            assert "line" in reply, reply
            lines.setdefault(stage.name, []).append(reply["line"])
        stage.table(lines[stage.name])
    assert {name: len(found) for name, found in lines.items()} == {
        "parity": 18, "ops": 1, "overhead": 1, "generate": 1, "sweep": 1, "train": 1,
        "train-beside": 1, "generate-beside": 1, "sweep-beside": 1, "train-compiled": 1,
    }  # fmt: skip
    assert all(line["facts"]["right"] for line in lines["parity"])
    assert [line["name"].partition(", ")[2] for line in lines["parity"][:3]] == [
        "bfloat16: rms_norm", "bfloat16: rms_norm, trained", "float32: rms_norm",
    ]  # fmt: skip
    assert list(lines["train"][0]["variants"]) == [OURS]
    assert len(lines["train-beside"][0]["variants"]) > 1


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Says what is wrong, and fails; what it gives its workers can be sent to them."""
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = pickle.loads(pickle.dumps(partial(gpu.stages, "cuda", False)))()
    assert [stage.name for stage in made][:2] == ["parity", "ops"]
    assert {stage.setting.device.type for stage in made} == {"cuda"}
    assert all(turn.bytes for stage in made for turn in stage.turns)
    assert [a.until for a in made] == sorted(a.until for a in made)

    def two(device: str, tiny: bool) -> list[Stage]:
        checks = [Case(facts={"right": right, "worst": "y", "reason": ""}) for right in (True, False)]
        turns = [Turn(CaseSpec(f"tiny, float32: {i}", lambda c=c: c, rounds=1)) for i, c in enumerate(checks)]  # type: ignore[misc]
        return [Stage("parity", SETTING, turns, parity.table)]

    monkeypatch.setattr(gpu, "stages", two)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 1
    assert "1 of 2 checks are right: not tiny, float32: 1" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "parity.json").read_text())["command"] == "python benchmarks/gpu.py --device cpu --tiny"
    )
