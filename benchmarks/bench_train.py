"""How fast is a training step? Ours alone; `cogsym bench train` sets it beside every alternative.

pytest benchmarks/bench_train.py
"""

from __future__ import annotations

from typing import Any

from cogsym.bench import train
from cogsym.bench.case import OURS, Case

PENDING = train.pending


def test_train(benchmark: Any, case: Case) -> None:
    variant = case.variants[OURS]
    with variant.turn():
        benchmark.pedantic(variant.run, rounds=5, warmup_rounds=int(variant.warm))
