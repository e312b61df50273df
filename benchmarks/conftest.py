"""Options of `bench.py`: `pytest benchmarks/bench.py --part ops --model Qwen2.5-0.5B --device cpu`."""

from __future__ import annotations

import pytest
import torch

from cogsym.bench.case import Setting
from cogsym.bench.suite import QUICK_MODELS, STUDIES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", action="append", choices=STUDIES, help="of cogsym bench; all where none is named")
    parser.addoption("--model", default=QUICK_MODELS[0], help="a named model or a folder")
    parser.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case."""
    if "spec" in metafunc.fixturenames:
        option = metafunc.config.getoption
        setting = Setting((option("--model"),), torch.device(option("--device")), full=False)
        specs = {f"{part}: {s.name}": s for part in option("--part") or STUDIES for s in STUDIES[part].cases(setting)}
        metafunc.parametrize("spec", list(specs.values()), ids=list(specs))
