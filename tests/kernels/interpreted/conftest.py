from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from cogsym.kernels.common import INTERPRETED

GUARD = 257


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run interpreted, the public operations choose them, and bfloat16 is rounded as every GPU rounds it.

    The interpreter cuts float32 off to bfloat16 instead of rounding to nearest even.
    """
    assert INTERPRETED, "set TRITON_INTERPRET=1 to run this folder by itself, or run tests/kernels/test_values.py"
    monkeypatch.setenv("COGSYM_BACKEND", "triton")
    cast = InterpreterBuilder.cast_impl

    def rounded(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
            return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture(autouse=True)
def dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 as if they were whole numbers."""
    create = InterpreterBuilder.create_dot

    def widened(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        def widen(x: TensorHandle) -> TensorHandle:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return create(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


@pytest.fixture(autouse=True)
def patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are patched to run interpreted, but not again in every function they call: a quarter of all time."""
    patch = triton_interpreter._patch_lang

    def once(function: Callable[..., Any]) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        return patch(function) if any(tl.core.is_builtin(language.load) for language in languages) else None

    monkeypatch.setattr(triton_interpreter, "_patch_lang", once)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory holds NaN, with more of it behind the end that nothing may write to."""
    buffers: list[tuple[Tensor, int]] = []

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            plain = allocate(*args, **kwargs)
            if not plain.is_floating_point() or plain.device.type != "cpu" or not plain.is_contiguous():
                return plain
            buffer = torch.full((plain.numel() + GUARD,), torch.nan, dtype=plain.dtype)
            buffers.append((buffer, plain.numel()))
            return buffer[: plain.numel()].view(plain.shape)

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield
    for buffer, end in buffers:
        assert buffer[end:].isnan().all(), "a kernel wrote behind the end of its output"


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh numbers on every run; the seed is printed when a test fails."""
    seed = int(torch.seed() % 2**32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def random(generator: torch.Generator) -> Callable[..., Tensor]:
    """random(*shape, dtype): normally distributed."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture
def assert_no_worse() -> Callable[..., None]:
    """Asserts that `got` is at most twice as far from the truth as plain PyTorch at the same precision.

    A few last bits are granted on top, because PyTorch may be exact by chance: of the largest true value, or of the
    largest of the `terms` that cancel in it.
    """

    def check(got: Tensor, plain: Tensor, truth: Tensor, terms: Tensor | None = None) -> None:
        assert got.dtype == plain.dtype
        assert got.shape == plain.shape
        assert got.is_contiguous()
        assert got.isfinite().all()
        if truth.numel() == 0:
            return
        arithmetic = torch.promote_types(got.dtype, torch.float32)
        last_bits = 4 * torch.finfo(arithmetic).eps * (truth if terms is None else terms).abs().max()
        error, allowed = (got.double() - truth).abs().max(), 2 * (plain.double() - truth).abs().max() + last_bits
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
