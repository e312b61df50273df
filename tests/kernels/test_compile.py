"""Every kernel, as its launch function launches it, compiles for every target with no register spilled."""

import importlib
import itertools
import pkgutil
from collections.abc import Iterator

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

import torch

import cogsym.kernels
from cogsym.kernels.common import INTERPRETED

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled", allow_module_level=True)

import aot
import facts
import triton.language as tl


@pytest.fixture(autouse=True, scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing comes from, or goes to, the user's cache; what two cases launch alike is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("compiled")))
        yield


def chosen() -> Iterator[object]:
    """Cases, dtypes and targets. Attention's kernels take a second each, so of them not all, and of the chips between
    two generations bfloat16 alone: aot.py has the others."""
    for case, dtype, target in itertools.product(aot.CASES, aot.DTYPES, aot.TARGETS):
        if target in ("sm_86", "sm_89") and dtype != torch.bfloat16:
            continue
        name = f"{case[0]}-{case[1]}-{aot.TYPE_NAMES[dtype]}-{target}"
        if case[0] != "attention" or (target in ("sm_90", "gfx942") and dtype != torch.float16):
            yield pytest.param(case, dtype, target, id=name)


@pytest.mark.parametrize(("case", "dtype", "target"), [*chosen()])
def test_compiles_without_spills(case: tuple[str, int], dtype: torch.dtype, target: str) -> None:
    launches = aot.launches(case, dtype, target)
    assert launches or (case[0] == "attention" and dtype.itemsize == 4)
    for launch in launches:
        resources = aot.resources(aot.compile_for(aot.TARGETS[target], launch))
        assert resources.spilled == 0, f"{launch.kernel.__name__}: {resources}"
        assert 0 < resources.registers <= 255
        assert resources.shared <= 64 * 1024  # what every target grants a block without asking


@triton.jit
def hungry_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Keeps N values alive across a sum of them all."""
    values = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, N), values / tl.sum(values, 0))


@triton.jit
def twice_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Loads what a sum of all of the first N decides on: 8 elements a thread, twice."""
    first = tl.load(x_ptr + tl.arange(0, N)).to(tl.float32)
    place = tl.sum(first, 0).to(tl.int32) * 16 + tl.arange(0, N)
    tl.store(y_ptr + tl.arange(0, N), tl.load(x_ptr + place).to(tl.float32) + first)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_spills_are_seen(target: str) -> None:
    N = 256 * 32 if aot.TARGETS[target].backend == "cuda" else 512 * 64  # the registers of one warp
    x = torch.empty(N, device="meta")
    with aot.recorded() as launches:
        hungry_kernel[(1,)](x, x, N=N, num_warps=1)
    assert aot.resources(aot.compile_for(aot.TARGETS[target], launches[0])).spilled > 0


def test_every_kernel_is_compiled() -> None:
    compiled = {launch.kernel for case in aot.CASES for launch in aot.launches(case, torch.float32)}
    modules = [
        importlib.import_module(f"cogsym.kernels.{m.name}") for m in pkgutil.iter_modules(cogsym.kernels.__path__)
    ]
    kernels = {value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    assert kernels
    assert compiled == kernels


def test_the_table_of_facts_has_every_kernel() -> None:
    """Written by facts.py: a row for every kernel and what it is launched for."""
    rows = facts.PAGE.read_text("utf-8").splitlines()
    assert f"| {' | '.join(facts.HEAD)} |" in rows
    listed = {tuple(row.split(" | ")[:2]) for row in rows if row.startswith("| ")}
    launched = {
        (f"| {launch.kernel.__module__.split('.')[-1]}.{launch.kernel.__name__}", f"{case[0]} {case[1]}")
        for case in aot.CASES
        for launch in aot.launches(case, torch.bfloat16)
    }
    assert listed - {("| kernel", "launched for"), ("| ---", "---")} == launched


def test_what_facts_are_read_from() -> None:
    """Loads by their bytes, those between barriers, and the share that follows."""
    x = torch.empty(1 << 16, device="meta", dtype=torch.bfloat16)
    with aot.recorded() as launches:
        twice_kernel[(1,)](x, x, N=1024, num_warps=4)
    found = facts.read(launches[0])
    assert found.loads == {16: 2} and found.between_barriers == 16 and not found.multiplications
    assert found.resident_warps == 64
    needed = facts.BANDWIDTH / facts.MULTIPROCESSORS * facts.LATENCY
    assert found.estimate() == f"at most 93% of bandwidth, {64 * 32 * 16 / needed:.1f} times the bytes"
