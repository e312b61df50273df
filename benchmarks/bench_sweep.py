"""How fast are many layer configurations scored? Ours alone; `cogsym bench sweep` sets it beside every alternative.

pytest benchmarks/bench_sweep.py
"""

from __future__ import annotations

from typing import Any

from cogsym.bench import sweep
from cogsym.bench.case import OURS, Case

PENDING = sweep.pending


def test_sweep(benchmark: Any, case: Case) -> None:
    benchmark.pedantic(case.variants[OURS].run, rounds=5, warmup_rounds=1)
