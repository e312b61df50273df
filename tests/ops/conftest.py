"""Fixtures of the operations' tests: every CPU backend and variant, poisoned buffers, fresh seeds, error bounds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cogsym.ops import backend

ISAS = [] if backend.unavailable("cpp") else __import__("cogsym._C", fromlist=["isas"]).isas()
NOT_BUILT = pytest.mark.skip(reason=f"no C++ extension: {backend.unavailable('cpp')}")
BACKENDS = (
    ["reference", *(f"cpp {isa}" for isa in ISAS)] if ISAS else ["reference", pytest.param("cpp", marks=NOT_BUILT)]
)


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for each test; pytest shows the line where one fails."""
    value = int.from_bytes(os.urandom(4))
    print(f"torch.manual_seed({value})")
    torch.manual_seed(value)
    return value


def force(backend_and_isa: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, _, isa = backend_and_isa.partition(" ")
    monkeypatch.setenv("COGSYM_BACKEND", name)
    if not isa:
        yield name
        return
    from cogsym import _C

    before = _C.isa()
    _C.set_isa(isa)
    yield name
    _C.set_isa(before)


@pytest.fixture(params=BACKENDS)
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference, then the C++ kernels in every variant that this processor runs."""
    yield from force(request.param, monkeypatch)


@pytest.fixture(params=[BACKENDS[0], BACKENDS[-1]])
def best_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference, then the C++ kernels in the variant in use: for what no variant changes."""
    yield from force(request.param, monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from `torch.empty_like` and `new_empty` starts as NaN, so that an element nobody wrote shows."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        empty = getattr(owner, name)

        def poison(*args: Any, empty: Callable[..., Tensor] = empty, **kwargs: Any) -> Tensor:
            return empty(*args, **kwargs).fill_(torch.nan)

        monkeypatch.setattr(owner, name, poison)


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """The last two arguments of every backward computation: which of the two gradients it was asked for."""
    calls: list[tuple[bool, bool]] = []
    implementation = backend.Kernel.implementation

    def recording(self: backend.Kernel, *args: Any) -> Callable[..., Any]:
        if self.name.endswith("backward"):
            calls.append(args[-2:])
        return implementation(self, *args)

    monkeypatch.setattr(backend.Kernel, "implementation", recording)
    return calls


@pytest.fixture
def assert_no_worse() -> Callable[..., None]:
    """(ours, PyTorch's own at the same precision, float64): our error is at most twice PyTorch's.

    Over many values that holds for the root mean square. The largest of a few is a matter of luck, so there the
    roundings that the formula takes are granted besides, each half a unit in the last place of `scale`: the largest
    value, or where values are sums that cancel, the largest sum of their terms' magnitudes.
    """
    roundings = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8, torch.float64: 32}

    def check(
        ours: Tensor | None, own: Tensor | None, exact: Tensor | None, what: str = "", scale: Tensor | None = None
    ) -> None:
        assert ours is not None and own is not None and exact is not None, what
        assert ours.dtype == own.dtype and ours.shape == exact.shape, what
        if not exact.numel():
            return
        error, allowed = ((t.double() - exact).abs() for t in (ours, own))
        largest = (exact if scale is None else scale).abs().max().item()
        slack = roundings[ours.dtype] * torch.finfo(ours.dtype).eps / 2 * largest
        worst, limit = error.max().item(), 2 * allowed.max().item() + slack
        assert worst <= limit, f"{what}: largest error {worst:.3g}, allowed {limit:.3g} with {slack:.3g} for roundings"
        if exact.numel() >= 100_000 and ours.dtype != torch.float64:  # in float64 the yardstick is no better
            typical, limit = error.square().mean().sqrt().item(), 2 * allowed.square().mean().sqrt().item()
            assert typical <= limit, f"{what}: typical error {typical:.3g}, allowed {limit:.3g}"

    return check


WORST_RATIOS = pytest.StashKey[dict[tuple[str, str, torch.dtype], float]]()


@pytest.fixture
def record_ratio(pytestconfig: pytest.Config) -> Callable[[str, str, torch.dtype, float], None]:
    """(operation, result, dtype, ratio): the worst of each are printed when all tests are done."""
    worst = pytestconfig.stash.setdefault(WORST_RATIOS, {})

    def record(*found: Any) -> None:
        *key, ratio = found
        worst[tuple(key)] = max(ratio, worst.get(tuple(key), 0.0))

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of docs/rounding.md."""
    worst = config.stash.get(WORST_RATIOS, {})
    if config.getoption("--fuzz-examples") is None or not worst:
        return
    dtypes = list(dict.fromkeys(dtype for _, _, dtype in worst))
    terminalreporter.write_sep("=", "worst ratio to PyTorch's error")
    names = " | ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    terminalreporter.write_line(f"| operation | result | {names} |\n|---|---|{'---|' * len(dtypes)}")
    for operation, result in dict.fromkeys(key[:2] for key in worst):
        ratios = " | ".join(f"{worst.get((operation, result, dtype), float('nan')):.2f}" for dtype in dtypes)
        terminalreporter.write_line(f"| {operation} | {result} | {ratios} |")
