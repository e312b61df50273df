"""The method counts and orders as it says; nothing here looks at how long anything took."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogsym.bench import floor, method
from cogsym.bench.case import Case, Variant, difference, join_passes, measure
from cogsym.bench.models import SHAPES, build, shape_of
from cogsym.errors import CogsymError
from cogsym.models import read_block

CPU = torch.device("cpu")


def test_turns_are_taken_in_order() -> None:
    calls: list[str] = []

    def variant(name: str) -> Variant:
        @contextlib.contextmanager
        def context() -> Iterator[None]:
            calls.append(f"{name} in")
            yield
            calls.append(f"{name} out")

        return Variant(lambda: calls.append(name), context)

    times = method.interleaved({"a": variant("a"), "b": variant("b")}, CPU, rounds=2, seconds=0)
    assert {name: {n: len(t) for n, t in rounds.items()} for name, rounds in times.items()} == {
        "a": {"seconds": 2},
        "b": {"seconds": 2},
    }
    assert calls == ["a in", "a", "a", "a out", "b in", "b", "b", "b out"] * 2


def test_some_rounds_are_made_after_a_deadline() -> None:
    times = method.interleaved({"a": Variant(lambda: None)}, CPU, rounds=9, seconds=0, deadline=0.0)
    assert len(times["a"]["seconds"]) == method.LEAST_ROUNDS


def test_what_a_variant_reports_is_kept_of_every_round() -> None:
    """A process times itself: its start is no part of its seconds, and it is called once a turn."""
    reports = iter([{"seconds": 2.0, "peak_bytes": 5.0}, {"seconds": 4.0, "peak_bytes": 7.0}])
    itself = Variant(lambda: next(reports), warm_up=False, scale=0.5, reports=True)
    line = measure(Case({"cogsym": itself, "plain": Variant(lambda: None)}), CPU, rounds=2)
    ours = line["variants"]["cogsym"]
    assert ours["seconds_of_each_round"] == [1.0, 2.0] and ours["peak_bytes_of_each_round"] == [5.0, 7.0]
    assert (ours["seconds"], ours["peak_bytes"]) == (1.5, 6.0)
    assert "peak_bytes" not in line["variants"]["plain"] and next(reports, None) is None


def test_a_case_without_variants_has_its_facts() -> None:
    line = measure(Case(facts={"bytes": 3}), CPU, rounds=2)
    assert line["facts"] == {"bytes": 3} and line["variants"] == {} and line["rounds_of_each_pass"] == []


def test_the_fastest_candidate_comes_first() -> None:
    found = method.fastest({n: lambda n=n: time.sleep(0.02 * n) for n in (2, 0, 1)})  # type: ignore[misc]
    assert list(found) == [0, 1, 2] and found[2] >= 0.04


def test_ratio_is_that_of_the_same_rounds() -> None:
    r = method.ratio([2.0, 4.0, 9.0, 16.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert r == {"median": 2.0, "min": 2.0, "max": 4.0, "lower": 2.0, "upper": 3.0}


def test_saved_bytes_are_counted_once() -> None:
    x = torch.randn(100, requires_grad=True)
    w = torch.randn(100, requires_grad=True)
    assert method.saved_bytes(lambda: (x * x * w).sum()) == 3 * 400  # x, x * x and w
    assert method.saved_bytes(lambda: (x * x * w).sum(), [w, x]) == 400


def test_counting_saved_bytes_leaves_nothing_behind() -> None:
    """exp saves its own result: held by its node, it would hold that node."""
    x = torch.randn(100, requires_grad=True)
    results: list[weakref.ref[Tensor]] = []

    def forward() -> None:
        results.append(weakref.ref(x.exp()))

    assert method.saved_bytes(forward) == 400
    assert results[0]() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library, which is left as it is")
def test_freed_memory_is_kept_for_large_blocks() -> None:
    """In a process of its own, as it stays so: no page of a block of 64 MB is new after a few of them."""
    code = """
import resource, torch
from cogsym.bench import method

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = torch.ones(2**24)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
method.keep_freed_memory()
faults(), faults()
after = faults()
assert before > 5 * 2**26 / 2**16 and after < before / 100, (before, after)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peak_bytes_are_those_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            a = torch.empty(1_000_000, dtype=torch.int8)
            b = torch.empty(2_000_000, dtype=torch.int8)
            del a, b

    assert method.peak_bytes(run, CPU) == pytest.approx(3_000_000, rel=0.01)


def test_the_floor_of_a_block_is_its_products() -> None:
    block = read_block(build("tiny", 1, torch.float32, CPU).model.layers[0])
    D, F, width, rows = 64, 160, (4 + 2 + 2) * 16, 8
    product = 2 * rows * (D * width + D * D + 3 * D * F)
    assert floor.frozen_layers([block], rows, torch.float32, CPU).flops == 2 * product
    lowest = floor.Products(torch.float32, CPU)
    lowest.add_block(block, rows, input_gradient=True, weight_gradient=True, lowest=True)
    assert lowest.flops == 3 * product - 2 * rows * D * width
    lowest()


@pytest.mark.parametrize(("name", "parameters"), [("SmolLM2-135M", 134_515_008), ("Qwen2.5-0.5B", 494_032_768)])
def test_named_models_have_their_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, None, torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "parameters"), [("Llama-3.2-1B", 1_235_814_400), ("Llama-3.1-8B", 8_030_261_248)])
def test_large_models_have_their_parameters(name: str, parameters: int) -> None:
    s = SHAPES[name]
    qkv = s.width * (s.heads + 2 * s.kv_heads) * s.head_dim
    layer = qkv + s.heads * s.head_dim * s.width + 3 * s.width * s.mlp_width + 2 * s.width
    head = s.vocabulary * s.width * (1 if s.tied else 2)
    assert s.layers * layer + head + s.width == parameters


def test_a_model_that_is_neither_known_nor_a_folder() -> None:
    with pytest.raises(CogsymError, match="--model is 'nothing', expected one of SmolLM2-135M"):
        shape_of("nothing")


def test_what_a_folder_holds_is_measured(model_folder: object) -> None:
    shape = shape_of(str(model_folder))
    assert (shape.layers, shape.vocabulary, shape.head_dim, shape.family) == (4, 300, 10, "Llama")
    assert len(build(str(model_folder), 2, torch.float32, CPU).model.layers) == 2


def test_a_variant_that_takes_too_long_is_left_out_and_said_so() -> None:
    case = Case({"cogsym": Variant(lambda: None), "slow": Variant(lambda: time.sleep(0.15))})
    line = measure(case, CPU, rounds=3, deadline=0.0)
    assert line["variants"].keys() == {"cogsym"}
    assert "too long" in line["skipped"]["slow"]


def test_passes_are_joined() -> None:
    def one(times: dict[str, list[float]], **extra: Any) -> dict[str, Any]:
        variants = {name: {"seconds_of_each_round": t} for name, t in times.items()}
        floor = {"seconds_of_each_round": [1.0] * len(times["cogsym"])}
        line = {"part": "ops", "name": "a", "unit": "B", "work": 10.0, "floor_work": 5.0, "variants": variants}
        return line | {"floor": floor, "rounds_of_each_pass": [len(times["cogsym"])], "skipped": {}} | extra

    first = one({"cogsym": [2.0, 2.0], "other": [4.0, 4.0], "third": [1.0, 1.0]})
    line = join_passes([first, one({"cogsym": [3.0], "other": [3.0]}, skipped={"third": "slow"})])
    assert line["rounds_of_each_pass"] == [2, 1] and line["skipped"] == {"third": "slow"}
    assert line["variants"].keys() == {"cogsym", "other"}
    ours, other = line["variants"]["cogsym"], line["variants"]["other"]
    assert (ours["seconds"], ours["rate"], line["floor"]["rate"]) == (2.0, 5.0, 5.0)
    assert (other["over_cogsym"]["median"], ours["over_floor"]["median"]) == (2.0, 1.0)


def test_difference_is_relative() -> None:
    truth = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert difference([torch.tensor([3.0]), torch.tensor([4.5])], truth) == pytest.approx(0.1)
