from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import gated_activation
from cogsym.ops.gated_activation import ACTIVATIONS, Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 7, 64, 576, 1027)


def exact_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The formulas of arXiv 2002.05202 and 1606.08415 in float64."""
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate * gate * gate))) * up


def transformers_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The middle of a Llama or Gemma MLP as transformers writes it."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def layouts(width: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    fused = torch.randn(3, 5, 2 * width + 1).to(dtype)
    swapped = torch.randn(5, 3, 2 * width).to(dtype).transpose(0, 1)
    return {
        "contiguous": (torch.randn(3, 5, width).to(dtype), torch.randn(3, 5, width).to(dtype)),
        "one row": (torch.randn(width).to(dtype), torch.randn(width).to(dtype)),
        "halves of a fused product": (fused[..., :width], fused[..., width : 2 * width]),
        "swapped": (swapped[..., :width], swapped[..., width:]),
        "columns": (torch.randn(width, 15).to(dtype).t(), torch.randn(15, width).to(dtype)),
        "expanded": (torch.randn(5, 1).to(dtype).expand(5, width), torch.randn(1, width).to(dtype).expand(5, width)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    activation: Activation,
    width: int,
    dtype: torch.dtype,
) -> None:
    for layout, inputs in layouts(width, dtype).items():
        dz = torch.randn_like(inputs[1])
        results = []
        for function, to in (
            (gated_activation, dtype),
            (transformers_activation, dtype),
            (exact_activation, torch.float64),
        ):
            leaves = [t.detach().to(to).requires_grad_() for t in inputs]
            z = function(*leaves, activation)
            results.append((z, *torch.autograd.grad(z, leaves, dz.to(to))))
        assert results[0][0].is_contiguous()
        gate, up = inputs
        scales = (gate.double() * up.double(), dz.double() * up.double(), dz.double() * gate.double())
        for what, scale, *values in zip(("z", "dgate", "dup"), scales, *results, strict=True):
            assert_no_worse(*values, f"{what}, {layout}", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_over_many_values(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    activation: Activation,
    dtype: torch.dtype,
) -> None:
    inputs, dz = [torch.randn(101, 1027).to(dtype) * 2 for _ in range(2)], torch.randn(101, 1027).to(dtype)
    results = []
    for function, to in (
        (gated_activation, dtype),
        (transformers_activation, dtype),
        (exact_activation, torch.float64),
    ):
        leaves = [t.to(to).detach().requires_grad_() for t in inputs]
        z = function(*leaves, activation)
        results.append((z, *torch.autograd.grad(z, leaves, dz.to(to))))
    for what, *values in zip(("z", "dgate", "dup"), *results, strict=True):
        assert_no_worse(*values, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_range(cpu_backend: str, activation: Activation, dtype: torch.dtype) -> None:
    """Every magnitude, where exponentials overflow and underflow; compared relative to each value."""
    largest = min(torch.finfo(dtype).max, 1e12)
    magnitude = torch.logspace(-6, torch.tensor(largest).log10().item() - 0.01, 4001, dtype=torch.float64)
    gate = torch.cat((-magnitude, torch.zeros(1, dtype=torch.float64), magnitude)).to(dtype).requires_grad_()
    up = torch.ones_like(gate).requires_grad_()
    z = gated_activation(gate, up, activation)
    z.sum().backward()
    truth = gate.detach().double().requires_grad_()
    argument = truth if activation == "silu" else 2 * gelu_argument(truth)
    sigmoid = torch.sigmoid(argument)
    exact = truth * sigmoid
    (slope,) = torch.autograd.grad(argument.sum(), truth, retain_graph=True)
    exact.sum().backward()
    sigmoid, slope, g = sigmoid.detach(), slope.detach(), truth.detach().abs()
    terms = sigmoid * (1 + g * (1 - sigmoid) * slope)  # of the derivative, which cancel where it passes through zero

    float32_eps = torch.finfo(torch.float32).eps
    # e^s has a relative error of |s| eps: what rounding its argument s costs at best.
    precision = torch.finfo(dtype).eps + (4 + argument.detach().abs().clamp(max=100)) * float32_eps
    subnormal = max(torch.finfo(torch.float32).tiny * 1e4, torch.finfo(dtype).smallest_normal)
    cancelled = g * float32_eps if cpu_backend == "reference" else 0  # PyTorch's 1 + tanh, where the tanh is near -1
    for ours, real, scale in ((z, exact, exact), (up.grad, exact, exact), (gate.grad, truth.grad, terms)):
        assert ours.isfinite().all()
        excess = ((ours.double() - real).abs() - precision * scale.abs() - subnormal - cancelled).max()
        assert excess <= 0, f"{excess:.3g}"


def gelu_argument(g: Tensor) -> Tensor:
    return (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_gradients_asked_for(
    best_backend: str, backward_calls: list[tuple[bool, bool]], activation: Activation, wanted: tuple[bool, bool]
) -> None:
    gate, up = (torch.randn(4, 33).requires_grad_(w) for w in wanted)
    exact_gate, exact_up = (t.detach().double().requires_grad_() for t in (gate, up))
    dz = torch.randn(4, 33)
    z = gated_activation(gate, up, activation)
    assert z.requires_grad == any(wanted)
    if any(wanted):
        z.backward(dz)
    exact_activation(exact_gate, exact_up, activation).backward(dz.double())
    for leaf, exact in ((gate, exact_gate), (up, exact_up)):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None
    assert backward_calls == ([wanted] if any(wanted) else [])
    raw = torch.ops.cogsym.gated_activation_backward(dz, gate.detach(), up.detach(), activation, *wanted)
    assert raw.shape == (4, 33 * sum(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity(cpu_backend: str, activation: Activation, dtype: torch.dtype) -> None:
    """Where an input is no number the result is what PyTorch's own operations give, and nothing else changes."""
    gate, up, dz = (torch.randn(6, 37).to(dtype) for _ in range(3))
    gate[0, 3], gate[1, 4], gate[2, 5], up[3, 6], up[4, 36] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    z = gated_activation(*leaves, activation)
    dgate, dup = torch.autograd.grad(z, leaves, dz)
    own_leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    own = transformers_activation(*own_leaves, activation)
    special = torch.zeros(6, 37, dtype=torch.bool)
    special[[0, 1, 2, 3, 4], [3, 4, 5, 6, 36]] = True
    torch.testing.assert_close(z[special], own[special], equal_nan=True)
    assert z[~special].isfinite().all() and dgate[~special].isfinite().all() and dup[~special].isfinite().all()
    assert dgate[0, 3].isnan() and dup[0, 3].isnan() and dgate[3, 6].isnan()


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (3, 0)])
def test_no_elements(best_backend: str, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
    z = gated_activation(gate, up, "silu")
    z.sum().backward()
    assert z.shape == gate.grad.shape == up.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_result_depends_on_neither_run_nor_threads_nor_other_rows(
    cpu_backend: str, activation: Activation, dtype: torch.dtype
) -> None:
    gate, up, dz = (torch.randn(133, 1027).to(dtype) for _ in range(3))

    def run(rows: slice) -> list[Tensor]:
        leaves = [gate[rows].clone().requires_grad_(), up[rows].clone().requires_grad_()]
        z = gated_activation(*leaves, activation)
        return [z.detach(), *torch.autograd.grad(z, leaves, dz[rows])]

    first = run(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(first, run(slice(None)), strict=True))
    if cpu_backend == "reference":
        return  # PyTorch's vector and scalar code differ in the last place
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(slice(None)), strict=True)), count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a[77:78], b) for a, b in zip(first, run(slice(77, 78)), strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(cpu_backend: str, activation: Activation) -> None:
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, activation), (gate, up))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(best_backend: str, activation: Activation) -> None:
    ops = torch.ops.cogsym
    fused = torch.randn(2, 3, 16)
    for inputs in (
        (torch.randn(3, 8), torch.randn(3, 8)),
        (fused[..., :8], fused[..., 8:]),
        (torch.randn(8, 3).t(), torch.randn(8, 3).t()),
    ):
        gate, up = (t.detach().requires_grad_() for t in inputs)
        torch.library.opcheck(ops.gated_activation.default, (gate, up, activation))
        dz = torch.randn_like(gate)
        for wanted in itertools.product([False, True], repeat=2):
            args = (dz, gate.detach(), up.detach(), activation, *wanted)
            torch.library.opcheck(ops.gated_activation_backward.default, args)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gate is \(2, 8\) torch.float32 and up \(1, 8\) torch.float32"):
        gated_activation(torch.ones(2, 8), torch.ones(1, 8), "silu")
    with pytest.raises(ValueError, match="expected the same shape and dtype"):
        gated_activation(torch.ones(2, 8), torch.ones(2, 8).bfloat16(), "silu")
    with pytest.raises(ValueError, match="activation is 'relu', expected one of silu, gelu_tanh"):
        gated_activation(torch.ones(2, 8), torch.ones(2, 8), "relu")  # type: ignore[arg-type]
