from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from cogsym.ops import int8_linear, int8_linear_input_gradient
from cogsym.ops.int8_linear import dequantised, quantise

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)
# (rows, outputs, inputs): numbers of rows that each loop takes, odd sizes, sizes of one, more than a block of each.
SHAPES = ((1, 1, 1), (1, 25, 67), (3, 49, 130), (8, 30, 31), (17, 50, 64), (33, 5, 1), (65, 1029, 330), (1300, 37, 19))


@pytest.fixture(params=[True, False], ids=["fast halves", "slow halves"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies 16 bits itself, and one that does not."""
    monkeypatch.setattr(sys.modules["cogsym.ops.int8_linear"], "native", lambda dtype: request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(
    cpu_backend: str, native: None, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    """Against float64 autograd on the weights that the integers stand for."""
    for (rows, outputs, inputs), with_bias in itertools.product(SHAPES, (True, False)):
        x, dy = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        weight, scale = quantise(torch.randn(outputs, inputs) * torch.rand(outputs, 1))
        bias = torch.randn(outputs).to(dtype) if with_bias else None
        wide = weight.double() * scale.double()[:, None]
        leaf = x.double().clone().requires_grad_()
        exact = F.linear(leaf, wide, None if bias is None else bias.double())
        exact.backward(dy.double())
        assert leaf.grad is not None
        own_leaf, rounded = x.clone().requires_grad_(), wide.to(dtype)
        own = F.linear(own_leaf, rounded, bias)
        own.backward(dy)
        leaf_ours = x.clone().requires_grad_()
        y = int8_linear(leaf_ours, weight, scale, bias)
        y.backward(dy)
        what = f"{rows} x {inputs} -> {outputs}"
        magnitude = x.double().abs() @ wide.abs().t() + (0 if bias is None else bias.double().abs())
        assert_no_worse(y.detach(), own.detach(), exact.detach(), f"y, {what}", magnitude)
        magnitude = dy.double().abs() @ wide.abs()
        assert_no_worse(leaf_ours.grad, own_leaf.grad, leaf.grad, f"dx, {what}", magnitude)
        assert torch.equal(int8_linear_input_gradient(dy, weight, scale), leaf_ours.grad)


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=2)])
def test_each_gradient(best_backend: str, needs: tuple[bool, bool]) -> None:
    weight, scale = quantise(torch.randn(7, 13))
    x, bias = torch.randn(5, 4, 13).requires_grad_(needs[0]), torch.randn(7).requires_grad_(needs[1])
    y = int8_linear(x, weight, scale, bias)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    dy = torch.randn_like(y)
    y.backward(dy)
    assert (x.grad is not None, bias.grad is not None) == needs
    if x.grad is not None:
        torch.testing.assert_close(x.grad, dy @ dequantised(weight, scale, torch.float32))
    if bias.grad is not None:
        torch.testing.assert_close(bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 20, 70])
def test_strided_rows(cpu_backend: str, transposed: bool, rows: int) -> None:
    x = torch.randn(rows, 3 * 40)[:, 40:80]
    weight, scale = quantise(torch.randn(90, 50))
    weight, scale = (weight[3:80:2, 5:45], scale[3:80:2]) if transposed else (weight[3:83:2, 5:44], scale[3:83:2])
    wide = weight.double() * scale.double()[:, None]
    got = int8_linear(x, weight, scale) if transposed else int8_linear_input_gradient(x, weight, scale)
    torch.testing.assert_close(got.double(), x.double() @ (wide.t() if transposed else wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_few_rows_of_any_number_and_size(
    best_backend: str, native: None, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    """Each number of them, of other magnitudes each, with some values far larger; a row that is not finite is alone."""
    weight, scale = quantise(torch.randn(37, 150))
    wide = weight.double() * scale.double()[:, None]
    for rows in range(1, 34):
        x = torch.randn(rows, 150) * torch.logspace(-4, 1, rows)[:, None]
        x[:, 7] *= 2000
        x, bias = x.to(dtype), torch.randn(37).to(dtype)
        exact = F.linear(x.double(), wide, bias.double())
        magnitude = x.double().abs() @ wide.abs().t() + bias.double().abs()
        y = int8_linear(x, weight, scale, bias)
        assert_no_worse(y, F.linear(x, wide.to(dtype), bias), exact, f"{rows} rows", magnitude)
        x[0, 3] = torch.inf if rows % 2 else torch.nan
        again = int8_linear(x, weight, scale, bias)
        assert not again[0].isfinite().any() and torch.equal(again[1:], y[1:])
    assert not int8_linear(torch.zeros(4, 150, dtype=dtype), weight, scale).any()


def test_leading_dimensions_and_empty_ones(cpu_backend: str) -> None:
    (weight, scale), bias = quantise(torch.randn(6, 5)), torch.randn(6)
    assert int8_linear(torch.randn(2, 3, 5), weight, scale, bias).shape == (2, 3, 6)
    assert int8_linear(torch.randn(5), weight, scale).shape == (6,)
    assert int8_linear(torch.randn(0, 5), weight, scale).shape == (0, 6)
    assert int8_linear(torch.randn(4, 5), weight[:0], scale[:0]).shape == (4, 0)
    assert torch.equal(int8_linear(torch.randn(4, 0), *quantise(torch.randn(6, 0)), bias), bias.expand(4, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_to_the_nearest(best_backend: str, dtype: torch.dtype) -> None:
    """No value moves by more than half a step, the largest of a row stands at 127, and zeros stay zeros."""
    weight = (torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    weight[4] = 0
    q, scale = quantise(weight)
    step = scale.double()[:, None]
    assert ((q.double() * step - weight.double()).abs() <= step / 2 * (1 + 1e-5)).all()
    assert (q.abs().amax(1) == torch.tensor([0 if i == 4 else 127 for i in range(9)])).all()
    torch.testing.assert_close(dequantised(q, scale, torch.float32).double(), q.double() * step, rtol=1e-7, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    (weight, scale), x = quantise(torch.randn(3, 4)), torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float32, expected torch\.int8"):
        int8_linear(x, weight.float(), scale)
    with pytest.raises(TypeError, match=r"scale has dtype torch\.bfloat16"):
        int8_linear(x, weight, scale.bfloat16())
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), expected \(3,\)"):
        int8_linear(x, weight, scale[:2])
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\)"):
        int8_linear(x[:, :3], weight, scale)
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([[1.0, torch.inf]]))
