"""How fast is each operation? Ours alone; `cogsym bench ops` sets it beside every backend and PyTorch's own.

pytest benchmarks/bench_ops.py
"""

from __future__ import annotations

from typing import Any

from cogsym.bench import ops
from cogsym.bench.case import OURS, Case

PENDING = ops.pending


def test_ops(benchmark: Any, case: Case) -> None:
    variant = case.variants[OURS]
    with variant.turn():
        benchmark.pedantic(variant.run, rounds=5, warmup_rounds=int(variant.warm))
