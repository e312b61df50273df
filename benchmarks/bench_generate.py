"""How fast do many layer configurations write? Ours alone; `cogsym bench generate` sets it beside every alternative.

pytest benchmarks/bench_generate.py
"""

from __future__ import annotations

from typing import Any

from cogsym.bench import generate
from cogsym.bench.case import OURS, Case

PENDING = generate.pending


def test_generate(benchmark: Any, case: Case) -> None:
    benchmark.pedantic(case.variants[OURS].run, rounds=5, warmup_rounds=1)
