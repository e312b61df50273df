"""Ours alone under pytest-benchmark; `cogsym bench` sets it beside every alternative.

pytest benchmarks/bench.py --part ops --part train --model Qwen2.5-0.5B
"""

from __future__ import annotations

from typing import Any

import pytest

from cogsym.bench.case import OURS, CaseSpec


def test_ours(benchmark: Any, spec: CaseSpec) -> None:
    case = spec.build()
    if OURS not in case.variants:
        pytest.skip(case.skipped.get(OURS, "ours is not among its variants"))
    variant = case.variants[OURS]
    with variant.context():
        benchmark.pedantic(variant.run, rounds=5, warmup_rounds=int(variant.warm_up))
