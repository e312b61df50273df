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
import triton.language as tl


@pytest.fixture(autouse=True, scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing comes from, or goes to, the user's cache; what two cases launch alike is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("compiled")))
        yield


def chosen() -> Iterator[object]:
    """Cases, dtypes and targets. Attention's kernels take a second each, so of them not all: aot.py has the others."""
    for case, dtype, target in itertools.product(aot.CASES, aot.DTYPES, aot.TARGETS):
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
