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
    """Memory from `torch.empty_like` starts as NaN, so that an element nobody wrote shows."""
    empty_like = torch.empty_like

    def nan_like(*args: Any, **kwargs: Any) -> Tensor:
        return empty_like(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty_like", nan_like)


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """The last two arguments of every backward computation: which of the two gradients it was asked for."""
    calls: list[tuple[bool, bool]] = []
    implementation = backend.implementation

    def recording(operation: str, reference: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
        function = implementation(operation, reference, tensor)

        def call(*args: Any) -> Any:
            if operation.endswith("backward"):
                calls.append(args[-2:])
            return function(*args)

        return call

    monkeypatch.setattr(backend, "implementation", recording)
    return calls


@pytest.fixture
def assert_no_worse() -> Callable[..., None]:
    """(ours, PyTorch's own at the same precision, float64): our largest error is at most twice PyTorch's.

    One unit in the last place of `scale` is granted besides: PyTorch may happen to be exact, and in float64 the
    yardstick is no better than what it measures. `scale` is the largest value, or where values are sums that cancel,
    the largest sum of their terms' magnitudes.
    """

    def check(
        ours: Tensor | None, own: Tensor | None, exact: Tensor | None, what: str = "", scale: Tensor | None = None
    ) -> None:
        assert ours is not None and own is not None and exact is not None, what
        assert ours.dtype == own.dtype and ours.shape == exact.shape, what
        if not exact.numel():
            return
        error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, own))
        scale = exact if scale is None else scale
        slack = torch.finfo(ours.dtype).eps * scale.abs().max().item() * (16 if ours.dtype == torch.float64 else 1)
        assert error <= 2 * allowed + slack, f"{what}: error {error:.3g}, PyTorch's own {allowed:.3g}, ulp {slack:.3g}"

    return check
