"""A quick run fits its time: it is sized by how fast products are, shares its time, and says what it leaves out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cogsym.bench import report, speed, study, suite
from cogsym.bench.case import OURS, Case, CaseSpec, Setting
from cogsym.bench.clock import Clock
from cogsym.bench.method import Variant
from cogsym.bench.speed import Speed
from cogsym.ops.products import native

CPU = torch.device("cpu")
AMX = Speed(torch.bfloat16, {torch.bfloat16: 1.8e12, torch.float32: 3e11})
AVX2 = Speed(torch.float32, {torch.bfloat16: 1e10, torch.float32: 1.2e11})
OLD = Speed(torch.float32, {torch.bfloat16: 1e9, torch.float32: 2e10})


def quick(here: Speed) -> Iterator[tuple[Setting, CaseSpec]]:
    for part in suite.STUDIES:
        setting = suite.quick_setting(part, suite.QUICK_MODELS, CPU, here)
        for spec in suite.STUDIES[part].cases(setting):
            yield setting, spec


def test_a_fast_machine_measures_everything_and_a_slow_one_less() -> None:
    work = {name: list(quick(here)) for name, here in (("amx", AMX), ("avx2", AVX2), ("old", OLD))}
    assert {setting.scale for setting, _ in work["amx"]} == {1.0}
    assert sum(suite.QUICK_SECONDS.values()) < 170
    for name in ("amx", "avx2"):
        assert sum(spec.seconds * spec.passes for _, spec in work[name]) < sum(suite.QUICK_SECONDS.values())
    scales = {name: min(setting.scale for setting, _ in cases) for name, cases in work.items()}
    assert scales["amx"] > scales["avx2"] > scales["old"] == suite.SCALES[-1]


def test_precisions_are_those_of_the_machine() -> None:
    for here, wanted, unwanted in ((AMX, "bfloat16", "float32"), (AVX2, "float32", "bfloat16")):
        names = " ".join(spec.name for setting, spec in quick(here))
        assert wanted in names and unwanted not in names
    full = Setting(suite.QUICK_MODELS, CPU, True, torch.float32)
    names = [spec.name for part in ("ops", "train", "sweep", "generate") for spec in suite.STUDIES[part].cases(full)]
    assert names and not [name for name in names if "bfloat16" in name]


def test_no_two_cases_are_named_alike() -> None:
    for here in (AMX, AVX2):
        names = [spec.name for _, spec in quick(here)]
        assert len(set(names)) == len(names)


def test_how_fast_products_are_is_known_soon() -> None:
    start = time.perf_counter()
    here = speed.measured(CPU)
    assert time.perf_counter() - start < 5
    assert here.rates.keys() == {torch.bfloat16, torch.float32} and min(here.rates.values()) > 1e7
    assert here.dtype == (torch.bfloat16 if native(torch.bfloat16) else torch.float32)


def left(line: str) -> int:
    minutes, seconds = re.findall(r"(\d+):(\d\d) left", line)[0]
    return 60 * int(minutes) + int(seconds)


def test_the_time_left_is_that_which_it_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Turns fill their shares, so that what is said at each of them comes true."""

    def cases(setting: Setting) -> list[CaseSpec]:
        return [
            CaseSpec(f"one: {i}", lambda: Case({OURS: Variant(lambda: time.sleep(0.01))}), 1000, 2, seconds=0.05 * i)
            for i in range(3)
        ]

    one = study.Study("one", cases, report.by_variant(lambda line, result: {"seconds": "1"}), pictures=())
    start = time.perf_counter()
    study.run([(one, Setting(("tiny",), CPU, False, seconds=4.0))], tmp_path, "command")
    assert 3.5 < time.perf_counter() - start < 6.0
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert len(set(lines)) == 6 and lines[3].startswith("4/6  one, pass 2 of 2: one: 0, ")
    said = [left(line) for line in lines]
    assert said[0] == 4 and said == sorted(said, reverse=True) and said[-1] == 1


def test_what_there_is_no_time_for_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def never() -> Any:
        raise AssertionError("built")

    def cases(setting: Setting) -> list[CaseSpec]:
        quick = CaseSpec("it: short", lambda: Case({OURS: Variant(lambda: None)}), 2, seconds=3.0)
        return [CaseSpec("it: rather long", never, seconds=4.0), quick, CaseSpec("it: long", never, seconds=60.0)]

    one = study.Study("one", cases, report.by_variant(lambda line, result: {"seconds": "1"}), pictures=())
    (path,) = study.run([(one, Setting(("tiny",), CPU, False, seconds=5.0))], tmp_path, "command")
    result = report.read(path)
    assert [line["name"] for line in result["cases"]] == ["it: short"] and result["left_out"] == [
        "it: rather long", "it: long",
    ]  # fmt: skip
    assert "Left out, as there was no time for them: one, it: rather long; one, it: long." in capsys.readouterr().out


def test_a_full_run_takes_what_it_takes() -> None:
    text = StringIO()
    clock = Clock([CaseSpec("a", Case, seconds=1e9), CaseSpec("b", Case)], None, Console(file=text))
    assert clock.start("a", CaseSpec("a", Case, seconds=1e9)) and clock.deadline is None
    assert clock.start("b", CaseSpec("b", Case)) and "2/2  b, about 0:0" in text.getvalue()
