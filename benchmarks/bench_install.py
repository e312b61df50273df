"""How long does the import take? `cogsym bench install --full` times an install and a first step as well.

pytest benchmarks/bench_install.py
"""

from __future__ import annotations

from typing import Any

from cogsym.bench import install
from cogsym.bench.case import OURS, Case

PENDING = install.pending


def test_install(benchmark: Any, case: Case) -> None:
    variant = case.variants[OURS]
    with variant.turn():
        benchmark.pedantic(variant.run, rounds=5, warmup_rounds=int(variant.warm))
