"""Is `cogsym bench compare` to be believed? Three quick runs of the same code, and one that is a tenth slower.

    python benchmarks/noise.py

The slower run spins for a tenth of each call of ours. Every pair is compared as `cogsym bench compare` does it. The
result, `benchmarks/results/noise.json`, holds the ratio of every case in each run, and the verdicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogsym.bench import machine, report
from cogsym.bench.case import OURS, Case, Setting
from cogsym.bench.compare import compare
from cogsym.bench.run import PARTS, QUICK_MODELS, QUICK_SECONDS, measured

SLOWDOWN = 0.1
CPU = torch.device("cpu")
RESULT = Path(__file__).parent / "results" / "noise.json"


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


def quick_run(parts: list[str], models: tuple[str, ...], slower: bool) -> dict[str, Any]:
    """What `cogsym bench --quick` writes, in one."""
    cases = []
    for part in parts:
        pending = PARTS[part](Setting(models, CPU, full=False))
        if slower:
            pending = [dataclasses.replace(p, build=partial(slowed, p.build)) for p in pending]
        cases += measured(pending, CPU, QUICK_SECONDS[part], print)
    return {"format": report.FORMAT, "machine": machine.describe(), "cases": cases}


def in_a_process(parts: list[str], model: str, slower: bool) -> dict[str, Any]:
    """The same as a user has it: in a process of its own, whose memory nobody has used before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, __file__, "--parts", *parts, "--model", model, "--one", str(path)]
        subprocess.run(command + ["--slower"] * slower, check=True)
        return json.loads(path.read_text("utf-8"))


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["ops", "train", "sweep", "generate"], choices=PARTS)
    parser.add_argument("--model", default=QUICK_MODELS[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", type=Path, help="only one run, into this file")
    parser.add_argument("--slower", action="store_true", help="of that one run ours is a tenth slower")
    args = parser.parse_args()
    if args.one:
        args.one.write_text(json.dumps(quick_run(args.parts, (args.model,), args.slower)), "utf-8")
        return
    runs = {f"run {i}": in_a_process(args.parts, args.model, False) for i in (1, 2, 3)}
    runs["a tenth slower"] = in_a_process(args.parts, args.model, True)
    ratios: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        for case in run["cases"]:
            for label, variant in case["variants"].items():
                for ratio in ("over_floor", "over_cogsym"):
                    if ratio in variant:
                        ratios.setdefault(f"{case['name']}: {label} {ratio}", {})[name] = variant[ratio]
    comparisons = {}
    for a, b in itertools.combinations(runs, 2):
        changes = [c for c in compare(runs[a], runs[b], (a, b)) if c.what == "time" and c.case.endswith(f"[{OURS}]")]
        comparisons[f"{a}, then {b}"] = {
            "verdicts": Counter(c.verdict for c in changes),
            "changes": {c.case: {"change": c.change, "noise": c.noise, "verdict": c.verdict} for c in changes},
        }
        print(f"{a}, then {b}:", dict(comparisons[f"{a}, then {b}"]["verdicts"]))
    result = {
        "command": "python benchmarks/noise.py",
        "machine": machine.describe(),
        "slowdown": SLOWDOWN,
        "comparisons": comparisons,
        "ratios": ratios,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
