from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import layer_norm, layer_norm_input_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 7, 64, 576, 1027)
EPS = 1e-5


def exact_norm(h: Tensor, weight: Tensor, bias: Tensor | None, offset: float) -> Tensor:
    """The formula of arXiv 1607.06450 in float64."""
    centred = h - h.sum(-1, keepdim=True) / h.shape[-1]
    n = centred / ((centred * centred).sum(-1, keepdim=True) / h.shape[-1] + EPS) ** 0.5
    return n * (weight + offset) + (0 if bias is None else bias)


def plain_norm(h: Tensor, weight: Tensor, bias: Tensor | None, offset: float) -> Tensor:
    """transformers' CohereLayerNorm without a bias, and PyTorch's own, as Nemotron calls it, with one."""
    if bias is not None:
        return F.layer_norm(h, weight.shape, weight + offset, bias, EPS)
    x = h if h.dtype == torch.float64 else h.float()
    x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return ((weight.to(x.dtype) + offset) * x).to(h.dtype)


def scales(h: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, offset: float) -> list[Tensor]:
    """The magnitudes of the terms that y, dx, dweight and dbias are sums of."""
    h, weight, dy = h.double(), weight.double() + offset, dy.double()
    centred = h - h.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = (h.abs() + h.mean(-1, keepdim=True).abs()) * r
    g = (dy * weight).abs()
    dx = r * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))
    rows = h.shape[-1]
    y = n * weight.abs() + (0 if bias is None else bias.double().abs())
    return [y, dx, (dy.abs() * n).reshape(-1, rows).sum(0), dy.abs().reshape(-1, rows).sum(0)]


def layouts(D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same operation must read all of these where they lie or copy them; with a mean that is not 0."""
    wide = torch.randn(3, 5, 2 * D + 3) + 0.7
    found = {
        "contiguous": torch.randn(3, 5, D) + 1.5,
        "one row": torch.randn(D),
        "slice": wide[..., 3 : D + 3],
        "swapped": torch.randn(5, 3, D).transpose(0, 1),
        "columns": torch.randn(D, 15).t(),
        "expanded": torch.randn(1, 1, D).expand(3, 5, D),
    }
    return {name: x.to(dtype) for name, x in found.items()}


def compare(
    assert_no_worse: Callable[..., None],
    x: Tensor,
    weight_dtype: torch.dtype,
    with_bias: bool,
    offset: float,
    what: str = "",
) -> None:
    parameters = [torch.randn(x.shape[-1]).to(weight_dtype) for _ in range(1 + with_bias)]
    dy, results = torch.randn_like(x), []
    for function in (None, plain_norm, exact_norm):
        leaves = [(t.double() if function is exact_norm else t).detach().requires_grad_() for t in (x, *parameters)]
        at, weight, bias = leaves if with_bias else (*leaves, None)
        y = function(at, weight, bias, offset) if function else layer_norm(at, weight, bias, EPS, offset=offset)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    assert results[0][0].is_contiguous()
    magnitudes = scales(x, parameters[0], parameters[1] if with_bias else None, dy, offset)
    for name, scale, *values in zip(("y", "dx", "dweight", "dbias"), magnitudes, *results, strict=False):
        assert_no_worse(*values, f"{name}, {what}", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize(("with_bias", "offset"), [(False, 0.0), (True, 0.0), (True, 1.0)])
def test_values_and_gradients(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    D: int,
    dtype: torch.dtype,
    with_bias: bool,
    offset: float,
) -> None:
    for layout, x in layouts(D, dtype).items():
        compare(assert_no_worse, x, dtype, with_bias, offset, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_over_many_values(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    """Long rows and many of them, so that sums in a poor order would show."""
    compare(assert_no_worse, (torch.randn(50, 4099) + 2).to(dtype), dtype, True, 0.0)


@pytest.mark.parametrize("weight_dtype", DTYPES[:3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_of_another_dtype(
    cpu_backend: str, assert_no_worse: Callable[..., None], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    compare(assert_no_worse, torch.randn(6, 65).to(dtype), weight_dtype, False, 0.0)


def test_a_mean_that_is_large_beside_the_spread(cpu_backend: str) -> None:
    """The squares are those of the centred row: mean(h²) - mean(h)² would have nothing left in float32."""
    x = torch.randn(4, 300) + 5000
    exact = exact_norm(x.double(), torch.ones(300).double(), None, 0.0)
    torch.testing.assert_close(layer_norm(x, torch.ones(300), None, EPS).double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_residual(cpu_backend: str, poisoned: None, D: int, dtype: torch.dtype) -> None:
    for (layout, x), alike in itertools.product(layouts(D, dtype).items(), (False, True)):
        weight, bias = torch.randn(2, D).to(dtype)
        stream = torch.randn_like(x) if alike else torch.randn(D, *x.shape[:-1]).to(dtype).movedim(0, -1)
        dy, dh = torch.randn_like(x), torch.randn_like(x)
        leaves = [t.detach().requires_grad_() for t in (x, stream, weight, bias)]
        y, h = layer_norm(leaves[0], leaves[2], leaves[3], EPS, residual=leaves[1])
        assert torch.equal(h, x + stream)  # rounded once, as PyTorch does it
        alone = [t.detach().clone().requires_grad_() for t in (h, weight, bias)]
        expected = layer_norm(*alone, EPS)
        assert torch.equal(y, expected), layout
        ours = torch.autograd.grad((y, h), leaves, (dy, dh))
        dx, *others = torch.autograd.grad(expected, alone, dy)
        assert torch.equal(ours[0], ours[1])
        assert all(torch.equal(a, b) for a, b in zip(ours[2:], others, strict=True))
        # The gradient of the stream is added before the only rounding.
        assert torch.equal(layer_norm_input_gradient(dy, h, weight, EPS, dh=dh), ours[0])
        largest = float((dx.double().abs() + dh.double().abs()).max())
        torch.testing.assert_close(ours[0], dx + dh, rtol=0, atol=4 * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_only_gradients_asked_for(best_backend: str, wanted: tuple[bool, ...], used: str) -> None:
    """x, residual, weight and bias: a gradient asked for has its value, another is None."""
    shapes = ((4, 9, 33), (4, 9, 33), (33,), (33,))
    leaves = [torch.randn(shape).requires_grad_(wants) for shape, wants in zip(shapes, wanted, strict=True)]
    reference = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    x, residual, weight, bias = leaves
    dy, dh = torch.randn(4, 9, 33), torch.randn(4, 9, 33)
    y, h = layer_norm(x, weight, bias, EPS, residual=residual)
    exact_h = reference[0] + reference[1]
    exact_y = exact_norm(exact_h, *reference[2:], 0.0)
    pairs = {"y": [(y, exact_y, dy)], "h": [(h, exact_h, dh)], "both": [(y, exact_y, dy), (h, exact_h, dh)]}[used]
    ours = [(out, g) for out, _, g in pairs if out.requires_grad]
    exact = [(out, g.double()) for _, out, g in pairs if out.requires_grad]
    if exact:
        torch.autograd.backward(*zip(*exact, strict=True))
    if ours:
        torch.autograd.backward(*zip(*ours, strict=True))
    for leaf, truth, wants in zip(leaves, reference, wanted, strict=True):
        if not wants:
            assert leaf.grad is None
        elif truth.grad is None:  # weight and bias, where only h was used
            assert leaf.grad is None or not leaf.grad.any()
        else:
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_gradients_not_needed_are_empty(best_backend: str) -> None:
    dy, h, weight = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    for needed in itertools.product([False, True], repeat=3):
        grads = torch.ops.cogsym.layer_norm_backward(dy, h, weight, EPS, 0.0, None, *needed)
        assert [g.numel() for g in grads] == [n * need for n, need in zip((15, 5, 5), needed, strict=True)]


def test_residual_of_another_dtype(best_backend: str) -> None:
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8)
    y, h = layer_norm(x, weight, None, EPS, residual=residual)
    assert torch.equal(h, x.float() + residual)
    torch.testing.assert_close(y, exact_norm(h.double(), weight.double(), None, 0.0).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_row(cpu_backend: str, dtype: torch.dtype, value: float) -> None:
    x, weight, dy = torch.randn(5, 70).to(dtype), torch.randn(70).to(dtype), torch.randn(5, 70).to(dtype)
    x[2, 66] = value
    leaf = x.clone().requires_grad_()
    y = layer_norm(leaf, weight, None, EPS)
    y.backward(dy)
    assert y[2].isnan().all() and leaf.grad[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all() and leaf.grad[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_rows(best_backend: str, shape: tuple[int, ...]) -> None:
    x, residual = (torch.randn(shape).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(6).requires_grad_() for _ in range(2))
    y, h = layer_norm(x, weight, bias, EPS, residual=residual)
    (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(6)) and torch.equal(bias.grad, torch.zeros(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_neither_run_nor_threads_nor_other_rows(cpu_backend: str, dtype: torch.dtype) -> None:
    x, dy = torch.randn(301, 577).to(dtype), torch.randn(301, 577).to(dtype)
    weight, bias = torch.randn(2, 577).to(dtype)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = layer_norm(*leaves, EPS)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    threads = torch.get_num_threads()
    first = run()
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        if cpu_backend == "reference":
            return  # PyTorch's own sums are cut by threads
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(layer_norm(x[17:18], weight, bias, EPS), first[0][17:18])


def test_gradcheck(cpu_backend: str) -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, EPS, offset=1.0), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, r, w: layer_norm(x, w, None, EPS, residual=r), (x, residual, weight))


def test_opcheck(best_backend: str) -> None:
    ops = torch.ops.cogsym
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for x in (torch.randn(2, 3, 8), torch.randn(2, 3, 8).transpose(0, 1), torch.randn(8, 6).t()):
        x, residual = (t.detach().requires_grad_() for t in (x, x * 2))
        torch.library.opcheck(ops.layer_norm.default, (x, weight, None, EPS, 1.0))
        torch.library.opcheck(ops.add_layer_norm.default, (x, residual, weight, bias, EPS, 0.0))
        dy, dh = (torch.randn_like(t) for t in (x, x))
        for stream, needed in ((None, (True, False, False)), (dh, (True, True, True)), (None, (False, True, False))):
            args = (dy, x.detach(), weight.detach(), EPS, 0.0, stream, *needed)
            torch.library.opcheck(ops.layer_norm_backward.default, args)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "residual", "message"),
    [
        ((2, 8), (7,), None, None, r"weight has shape \(7,\), expected \(8,\)"),
        ((2, 8), (8,), (1, 8), None, r"bias is \(1, 8\) torch.float32, expected \(8,\) torch.float32"),
        ((2, 8), (8,), None, (1, 8), r"residual has shape \(1, 8\), expected \(2, 8\)"),
    ],
)
def test_shapes_that_do_not_fit(
    x: tuple, weight: tuple, bias: tuple | None, residual: tuple | None, message: str
) -> None:
    given = [None if shape is None else torch.ones(shape) for shape in (x, weight, bias, residual)]
    with pytest.raises(ValueError, match=message):
        layer_norm(*given[:3], EPS, residual=given[3])
