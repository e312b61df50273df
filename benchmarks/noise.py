"""Is `cogsym bench compare` to be believed? Three quick runs of the same code, and one that is a tenth slower.

    python benchmarks/noise.py

Each run is a process of its own, as a user has it, whose memory nobody has used before; it writes what
`cogsym bench --quick` writes. The slower one spins for a tenth of each call of ours. Every pair of runs is compared as
`cogsym bench compare` does it. The result holds the ratio of every case in each run, and the verdicts.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogsym.bench import process, report, speed, study, suite
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.compare import compare

SLOWDOWN = 0.1
PARTS = {True: ("ops", "train", "sweep", "generate"), False: ("ops",)}  # by whether the run is full
RUNS = {"run 1": False, "run 2": False, "run 3": False, "a tenth slower": True}
RUN = """
import pathlib, sys
sys.path.insert(0, folder)
import noise
noise.quick_run(parts, model, slower, pathlib.Path(out))
"""


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = setting.models
    runs = [CaseSpec(f"runs: {name}", partial(one_run, name, model, setting)) for name in RUNS]
    pairs = itertools.combinations(RUNS, 2)
    return runs + [CaseSpec(f"pairs: {a}, then {b}", partial(one_pair, a, b, setting)) for a, b in pairs]


def slowed(build: Callable[[], Case]) -> Case:
    """A case whose own variant takes a tenth longer."""
    case = build()
    ours = case.variants[OURS]

    def run() -> None:
        start = time.perf_counter()
        ours.run()
        end = start + (1 + SLOWDOWN) * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass

    case.variants[OURS] = dataclasses.replace(ours, run=run)
    return case


def quick_run(parts: list[str], model: str, slower: bool, out: Path) -> None:
    """What `cogsym bench --quick` does."""

    def slower_cases(cases: Callable[[Setting], list[CaseSpec]], setting: Setting) -> list[CaseSpec]:
        return [dataclasses.replace(spec, build=partial(slowed, spec.build)) for spec in cases(setting)]

    work, device = [], torch.device("cpu")
    here = speed.measured(device)
    for part in parts:
        one, setting = suite.STUDIES[part], suite.quick_setting(part, (model,), device, here)
        work.append((dataclasses.replace(one, cases=partial(slower_cases, one.cases)) if slower else one, setting))
    study.run(work, out, "cogsym bench --quick")


def one_run(name: str, model: str, setting: Setting) -> Case:
    """Every ratio of a run."""
    here = str(Path(__file__).parent)
    asked = {"parts": PARTS[setting.full], "model": model, "slower": RUNS[name], "out": str(setting.work / name)}
    process.run_python(RUN, folder=here, **asked)
    ratios = {
        f"{line['name']}: {label} {ratio}": result[ratio]
        for line in read(name, setting)["cases"]
        for label, result in line["variants"].items()
        for ratio in ("over_floor", "over_cogsym")
        if ratio in result
    }
    return Case(facts={"ratios": ratios})


def one_pair(a: str, b: str, setting: Setting) -> Case:
    """What `compare` says of ours."""
    changes = [
        c
        for c in compare(read(a, setting), read(b, setting), (a, b))
        if c.what == "time" and c.case.endswith(f"[{OURS}]")
    ]
    verdicts = dict(Counter(c.verdict for c in changes))
    by_case = {c.case: {"change": c.change, "noise": c.noise, "verdict": c.verdict} for c in changes}
    return Case(facts={"verdicts": verdicts, "changes": by_case})


def read(name: str, setting: Setting) -> dict[str, Any]:
    """A run's parts as one result."""
    results = [report.read(setting.work / name / f"{part}.json") for part in PARTS[setting.full]]
    return results[0] | {"cases": [line for result in results for line in result["cases"]]}


def table(lines: list[Line]) -> report.Table:
    """Every ratio in each of the runs; or what `compare` says of each pair of them."""
    names = {line["name"].partition(": ")[2]: line["facts"] for line in lines}
    if "verdicts" in lines[0]["facts"]:
        kinds = ("noise", "regression", "improvement")
        rows = [[pair, *(str(facts["verdicts"].get(kind, 0)) for kind in kinds)] for pair, facts in names.items()]
        return ["the first, and what was compared with it", *kinds], rows
    ratios = dict.fromkeys(ratio for facts in names.values() for ratio in facts["ratios"])
    rows = [
        [ratio.replace("_", " "), *(report.spread(facts["ratios"].get(ratio)) for facts in names.values())]
        for ratio in ratios
    ]
    return ["ratio", *names], rows


STUDY = study.Study("noise", cases, table, pictures=(), models=suite.QUICK_MODELS)

if __name__ == "__main__":
    study.main(STUDY, __doc__)
