from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import activation, activation_gradient, gated_activation, gated_activation_gradients
from cogsym.ops.activation import ACTIVATIONS, Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 7, 64, 576, 1027)


def exact(x: Tensor, kind: Activation) -> Tensor:
    """The formulas of arXiv 2002.05202, 1606.08415 and 2109.08668 in float64."""
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
    if kind == "gelu":
        return 0.5 * x * torch.erfc(-x / 2**0.5)
    return torch.where(x > 0, x, 0) ** (2 if kind == "relu2" else 1)


def plain(x: Tensor, kind: Activation) -> Tensor:
    """As transformers.activations has them."""
    if kind == "relu2":
        return torch.square(F.relu(x))
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[kind](x)


def exact_activation(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    return exact(gate, kind) * up


def transformers_activation(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """The middle of a Llama or Gemma MLP as transformers writes it."""
    return plain(gate, kind) * up


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
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_and_gradients(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    kind: Activation,
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
            z = function(*leaves, kind)
            results.append((z, *torch.autograd.grad(z, leaves, dz.to(to))))
        assert results[0][0].is_contiguous()
        gate, up = inputs
        scales = (gate.double() * up.double(), dz.double() * up.double(), dz.double() * gate.double())
        for what, scale, *values in zip(("z", "dgate", "dup"), scales, *results, strict=True):
            assert_no_worse(*values, f"{what}, {layout}", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_error_over_many_values(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    kind: Activation,
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
        z = function(*leaves, kind)
        results.append((z, *torch.autograd.grad(z, leaves, dz.to(to))))
    for what, *values in zip(("z", "dgate", "dup"), *results, strict=True):
        assert_no_worse(*values, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_whole_range(cpu_backend: str, kind: Activation, dtype: torch.dtype) -> None:
    """Every magnitude, where exponentials overflow and underflow; compared relative to each value."""
    largest = min(torch.finfo(dtype).max ** (0.5 if kind == "relu2" else 1), 1e12)
    magnitude = torch.logspace(-6, torch.tensor(largest).log10().item() - 0.01, 4001, dtype=torch.float64)
    gate = torch.cat((-magnitude, torch.zeros(1, dtype=torch.float64), magnitude)).to(dtype).requires_grad_()
    up = torch.ones_like(gate).requires_grad_()
    z = gated_activation(gate, up, kind)
    z.sum().backward()
    value, slope, terms, argument = truth(gate.detach().double(), kind)

    float32_eps = torch.finfo(torch.float32).eps
    # e^s has a relative error of |s| eps: what rounding its argument s costs at best.
    precision = torch.finfo(dtype).eps + (4 + argument.clamp(max=100)) * float32_eps
    subnormal = max(torch.finfo(torch.float32).tiny * 1e4, torch.finfo(dtype).smallest_normal)
    # PyTorch's 1 + tanh, where the tanh is near -1, and 1 + erf, with an erf that is off by a few last bits
    last_bits = (4 if kind == "gelu" else 1) * float32_eps if cpu_backend == "reference" else 0
    cancelled = gate.detach().double().abs() * last_bits
    for ours, real, scale in ((z, value, value), (up.grad, value, value), (gate.grad, slope, terms)):
        assert ours.isfinite().all()
        excess = ((ours.double() - real).abs() - precision * scale.abs() - subnormal - cancelled).max()
        assert excess <= 0, f"{excess:.3g}"


def truth(x: Tensor, kind: Activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """act(x), act'(x), the magnitudes of the terms of the latter, which cancel where it passes through zero, and of the
    exponent in it; float64."""
    if kind in ("relu", "relu2"):
        step = (x > 0).double()
        slope = step if kind == "relu" else 2 * x * step
        return x * slope / (1 if kind == "relu" else 2), slope, slope, torch.zeros_like(x)
    if kind == "gelu":
        share, bell = 0.5 * torch.erfc(-x / 2**0.5), torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
        return x * share, share + x * bell, share + x.abs() * bell, x * x / 2
    x = x.requires_grad_()
    argument = x if kind == "silu" else 2 * gelu_argument(x)
    (slope,) = torch.autograd.grad(argument.sum(), x, retain_graph=True)
    sigmoid = torch.sigmoid(argument)
    value = x * sigmoid
    (gradient,) = torch.autograd.grad(value.sum(), x)
    sigmoid, argument, x = sigmoid.detach(), argument.detach(), x.detach()
    terms = sigmoid * (1 + x.abs() * (1 - sigmoid) * slope)
    return value.detach(), gradient, terms, argument.abs()


def gelu_argument(g: Tensor) -> Tensor:
    return (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_only_gradients_asked_for(
    best_backend: str, backward_calls: list[tuple[bool, bool]], kind: Activation, wanted: tuple[bool, bool]
) -> None:
    gate, up = (torch.randn(4, 33).requires_grad_(w) for w in wanted)
    exact_gate, exact_up = (t.detach().double().requires_grad_() for t in (gate, up))
    dz = torch.randn(4, 33)
    z = gated_activation(gate, up, kind)
    assert z.requires_grad == any(wanted)
    if any(wanted):
        z.backward(dz)
    exact_activation(exact_gate, exact_up, kind).backward(dz.double())
    for leaf, exact in ((gate, exact_gate), (up, exact_up)):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None
    assert backward_calls == ([wanted] if any(wanted) else [])
    raw = torch.ops.cogsym.gated_activation_backward(dz, gate.detach(), up.detach(), kind, *wanted)
    assert raw.shape == (4, 33 * sum(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_and_infinity(cpu_backend: str, kind: Activation, dtype: torch.dtype) -> None:
    """Where an input is no number the result is what PyTorch's own operations give, and nothing else changes."""
    gate, up, dz = (torch.randn(6, 37).to(dtype) for _ in range(3))
    gate[0, 3], gate[1, 4], gate[2, 5], up[3, 6], up[4, 36] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    z = gated_activation(*leaves, kind)
    dgate, dup = torch.autograd.grad(z, leaves, dz)
    own_leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    own = transformers_activation(*own_leaves, kind)
    special = torch.zeros(6, 37, dtype=torch.bool)
    special[[0, 1, 2, 3, 4], [3, 4, 5, 6, 36]] = True
    if kind == "gelu":  # PyTorch's own says NaN of infinity, where the formula says infinity
        assert not z[1, 4].isfinite()
        z, own = z.detach().index_fill(0, torch.tensor(1), 0), own.detach().index_fill(0, torch.tensor(1), 0)
    torch.testing.assert_close(z[special], own[special], equal_nan=True)
    assert z[~special].isfinite().all() and dgate[~special].isfinite().all() and dup[~special].isfinite().all()
    assert dgate[0, 3].isnan() and dup[0, 3].isnan() and dgate[3, 6].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_without_a_gate(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], kind: Activation, dtype: torch.dtype
) -> None:
    for layout, (x, _) in layouts(133, dtype).items():
        dz, results = torch.randn_like(x), []
        for function, to in ((activation, dtype), (plain, dtype), (exact, torch.float64)):
            leaf = x.detach().to(to).requires_grad_()
            z = function(leaf, kind)
            results.append((z, *torch.autograd.grad(z, leaf, dz.to(to))))
        assert results[0][0].is_contiguous()
        for what, scale, *values in zip(("z", "dx"), (x.double(), dz.double()), *results, strict=True):
            assert_no_worse(*values, f"{what}, {layout}", scale * (x.double() if kind == "relu2" else 1))
        assert torch.equal(activation_gradient(dz, x, kind), results[0][1])
        assert not activation(x, kind).requires_grad


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradients_without_autograd(best_backend: str, kind: Activation) -> None:
    gate, up, dz = (torch.randn(3, 33) for _ in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    expected = torch.autograd.grad(gated_activation(*leaves, kind), leaves, dz)
    assert torch.equal(gated_activation_gradients(dz, gate, up, kind), torch.cat(expected, -1))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (3, 0)])
def test_no_elements(best_backend: str, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, requires_grad=True) for _ in range(2))
    z = gated_activation(gate, up, "silu")
    z.sum().backward()
    assert z.shape == gate.grad.shape == up.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_result_depends_on_neither_run_nor_threads_nor_other_rows(
    cpu_backend: str, kind: Activation, dtype: torch.dtype
) -> None:
    gate, up, dz = (torch.randn(133, 1027).to(dtype) for _ in range(3))

    def run(rows: slice) -> list[Tensor]:
        leaves = [gate[rows].clone().requires_grad_(), up[rows].clone().requires_grad_()]
        z = gated_activation(*leaves, kind)
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


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradcheck(cpu_backend: str, kind: Activation) -> None:
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, kind), (gate, up))
    assert torch.autograd.gradcheck(lambda g: activation(g, kind), (gate,))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_opcheck(best_backend: str, kind: Activation) -> None:
    ops = torch.ops.cogsym
    fused = torch.randn(2, 3, 16)
    for inputs in (
        (torch.randn(3, 8), torch.randn(3, 8)),
        (fused[..., :8], fused[..., 8:]),
        (torch.randn(8, 3).t(), torch.randn(8, 3).t()),
    ):
        gate, up = (t.detach().requires_grad_() for t in inputs)
        torch.library.opcheck(ops.gated_activation.default, (gate, up, kind))
        dz = torch.randn_like(gate)
        for wanted in itertools.product([False, True], repeat=2):
            args = (dz, gate.detach(), up.detach(), kind, *wanted)
            torch.library.opcheck(ops.gated_activation_backward.default, args)
        torch.library.opcheck(ops.gated_activation.default, (gate, None, kind))
        torch.library.opcheck(ops.gated_activation_backward.default, (dz, gate.detach(), None, kind, True, False))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gate is \(2, 8\) torch.float32 and up \(1, 8\) torch.float32"):
        gated_activation(torch.ones(2, 8), torch.ones(1, 8), "silu")
    with pytest.raises(ValueError, match="expected the same shape and dtype"):
        gated_activation(torch.ones(2, 8), torch.ones(2, 8).bfloat16(), "silu")
    with pytest.raises(ValueError, match="gated_activation: kind is 'swish', expected one of silu, gelu_tanh, gelu"):
        gated_activation(torch.ones(2, 8), torch.ones(2, 8), "swish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^activation: kind is 'swish', expected one of silu, gelu_tanh, gelu"):
        activation(torch.ones(2, 8), "swish")  # type: ignore[arg-type]
