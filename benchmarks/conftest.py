"""Options of the pytest-benchmark modules: `pytest benchmarks/bench_ops.py --model Qwen2.5-0.5B --device cpu`."""

from __future__ import annotations

import pytest
import torch

from cogsym.bench.case import OURS, Case, Pending, Setting
from cogsym.bench.run import QUICK_MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", default=QUICK_MODELS[0], help="a named model or a folder")
    parser.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case that the module's `pending` names."""
    if "pending" in metafunc.fixturenames:
        option = metafunc.config.getoption
        setting = Setting((option("--model"),), torch.device(option("--device")), full=False)
        cases = metafunc.module.PENDING(setting)
        metafunc.parametrize("pending", cases, ids=[case.name for case in cases])


@pytest.fixture
def case(pending: Pending) -> Case:
    made = pending.build()
    if OURS not in made.variants:
        pytest.skip(made.skipped.get(OURS, "ours is not among its variants"))
    return made
