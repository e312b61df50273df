"""A regression is told from noise, and files that cannot be compared are refused in one sentence."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogsym import cli
from cogsym.bench import case, report
from cogsym.bench.compare import compare
from cogsym.errors import CogsymError

MACHINE = {"processor": "a", "cores": "2", "threads": "2", "gpu": "none", "torch": "2.13"}


def result(seed: int, slowdown: float = 1.0, noise: float = 0.02, rounds: int = 15, cases: int = 12) -> dict[str, Any]:
    """A file of a machine whose speed wanders, for ours and the floor alike, with noise of each call's own."""
    chance = random.Random(seed)
    lines = []
    for i in range(cases):
        pace = [chance.uniform(1.0, 1.5) for _ in range(rounds)]
        times = {
            name: [base * p * chance.gauss(1, noise) for p in pace]
            for name, base in (("cogsym", slowdown), ("transformers", 2.0), ("floor", 0.5))
        }
        variants = {n: {"seconds_of_each_round": t} for n, t in times.items() if n != "floor"}
        variants["cogsym"]["kept_bytes_a_token"] = 1152.0  # type: ignore[assignment]
        floor = {"seconds_of_each_round": times["floor"]}
        line = {"part": "train", "name": f"case {i}", "variants": variants, "floor": floor}
        lines.append(line | {"rounds_of_each_pass": [rounds]})
    return {"format": report.FORMAT, "machine": MACHINE, "cases": lines}


@pytest.mark.parametrize("rounds", [5, 9, 15])
def test_the_same_code_is_noise(rounds: int) -> None:
    for seed in range(10):
        changes = compare(result(seed, rounds=rounds), result(seed + 100, rounds=rounds))
        assert len(changes) == 24
        assert {c.verdict for c in changes} == {"noise", "same"}, seed


@pytest.mark.parametrize("seed", range(5))
def test_a_tenth_slower_is_a_regression(seed: int) -> None:
    times = [c for c in compare(result(seed), result(seed + 100, 1.1)) if c.what == "time"]
    assert sum(c.verdict == "regression" for c in times) >= 10
    assert not [c for c in times if c.verdict == "improvement"]


def test_a_tenth_within_the_spread_is_noise() -> None:
    changes = compare(result(1, noise=0.3), result(2, 1.1, noise=0.3))
    assert sum(c.verdict == "noise" for c in changes if c.what == "time") >= 10


def test_passes_that_differ_are_noise() -> None:
    """A machine that changes its mood between passes: within each the rounds agree."""

    def moody(a: float, b: float, c: float) -> dict[str, Any]:
        one = result(1, noise=0.001)
        for line in one["cases"]:
            times = [0.5 * x for x in (a, b, c) for _ in range(5)]
            line["variants"]["cogsym"]["seconds_of_each_round"] = times
            line["floor"]["seconds_of_each_round"] = [0.5] * 15
            line["rounds_of_each_pass"] = [5, 5, 5]
        return one

    changes = compare(moody(1.0, 1.1, 0.9), moody(1.0, 1.2, 1.15))
    assert {c.verdict for c in changes if c.what == "time"} == {"noise"}


def test_a_faster_one_is_an_improvement() -> None:
    verdicts = [c.verdict for c in compare(result(1), result(2, 0.8)) if c.what == "time"]
    assert set(verdicts) == {"improvement"}


def test_one_more_byte_is_a_regression() -> None:
    a = result(1)
    b = copy.deepcopy(a)
    b["cases"][3]["variants"]["cogsym"]["kept_bytes_a_token"] += 1
    regressions = [c for c in compare(a, b) if c.verdict == "regression"]
    assert [(c.case, c.what) for c in regressions] == [("case 3 [cogsym]", "kept_bytes_a_token")]


@pytest.mark.parametrize("field", ["processor", "threads", "gpu"])
def test_another_machine_is_refused(field: str) -> None:
    b = result(1)
    b["machine"] = MACHINE | {field: "other"}
    with pytest.raises(CogsymError, match=rf"A and B cannot be compared: {field} is .* measure both on one machine\.$"):
        compare(result(1), b)


def test_other_cases_are_refused() -> None:
    b = result(1)
    for line in b["cases"]:
        line["part"] = "ops"
    with pytest.raises(CogsymError, match="A and B have no case in common"):
        compare(result(1), b)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cogsym", "bench", "compare", *map(str, args)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def test_exit_statuses(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, content in zip(paths, (result(1), result(2), result(3, 1.3)), strict=True):
        path.write_text(json.dumps(content))
    assert command(paths[0], paths[1])[0] == 0
    status, out, _ = command(paths[0], paths[2])
    assert status == 1 and "regression" in out
    assert command(paths[2], paths[0])[0] == 0


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "cogsym bench 0"}', '{"cases": []}'])
def test_a_file_of_another_shape(command: Callable[..., tuple[int, str, str]], tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    status, _, err = command(tmp_path / "a.json", tmp_path / "a.json")
    assert status == 2 and len(err.splitlines()) == 1
    assert "is no result file of this version" in err


def test_a_missing_file_and_a_missing_word(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert "cannot be read" in command(tmp_path / "none.json", tmp_path / "none.json")[2]
    assert "expected two" in command(tmp_path / "none.json")[2]


def test_what_is_measured_can_be_compared(tmp_path: Path) -> None:
    """The fields that compare reads are those that measure writes."""
    variants = {"cogsym": case.Variant(lambda: None), "other": case.Variant(lambda: None)}
    line = case.measure(case.Case(variants, floor=lambda: None), torch.device("cpu"), rounds=3)
    written = {"format": report.FORMAT, "machine": MACHINE, "cases": [{"part": "ops", "name": "a"} | line]}
    (change,) = compare(written, json.loads(json.dumps(written)))
    assert change.verdict == "noise" and change.change == 0


def test_without_rounds_there_is_no_noise_to_judge_by() -> None:
    """Files that were converted from medians: counted bytes are compared, times are not."""
    a = result(1)
    for line in a["cases"]:
        del line["variants"]["cogsym"]["seconds_of_each_round"]
    assert {c.what for c in compare(a, result(2))} == {"kept_bytes_a_token"}
