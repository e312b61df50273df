from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cogsym.ops import rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 7, 64, 576, 1027)
EPS = 1e-6


def exact_norm(h: Tensor, weight: Tensor, offset: float) -> Tensor:
    """The formula of arXiv 1910.07467 in float64."""
    return h / ((h * h).sum(-1, keepdim=True) / h.shape[-1] + EPS) ** 0.5 * (weight + offset)


def gradient_scales(h: Tensor, weight: Tensor, dy: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """The magnitudes of the terms that dx and dweight are sums of."""
    h, weight, dy = h.double(), weight.double(), dy.double()
    r = (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return dy * (offset + weight) * r, (dy * h * r).abs().reshape(-1, h.shape[-1]).sum(0)


def transformers_norm(h: Tensor, weight: Tensor, offset: float) -> Tensor:
    """LlamaRMSNorm and, with an offset, Gemma's, as transformers writes them."""
    x = h if h.dtype == torch.float64 else h.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y = x * (offset + weight.to(x.dtype)) if offset else weight * x.to(h.dtype)
    return y.to(h.dtype)


def layouts(D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same operation must read all of these where they lie or copy them."""
    wide = torch.randn(3, 5, 2 * D + 3).to(dtype)
    return {
        "contiguous": torch.randn(3, 5, D).to(dtype),
        "one row": torch.randn(D).to(dtype),
        "slice": wide[..., 3 : D + 3],
        "swapped": torch.randn(5, 3, D).to(dtype).transpose(0, 1),
        "columns": torch.randn(D, 15).to(dtype).t(),
        "expanded": torch.randn(1, 1, D).to(dtype).expand(3, 5, D),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_and_gradients(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], D: int, dtype: torch.dtype, offset: float
) -> None:
    for layout, x in layouts(D, dtype).items():
        weight = torch.randn(D).to(dtype)
        dy = torch.randn_like(x)
        results = []
        for function, to in ((exact_norm, torch.float64), (transformers_norm, dtype), (None, dtype)):
            leaves = [t.detach().to(to).requires_grad_() for t in (x, weight)]
            y = function(*leaves, offset) if function else rms_norm(*leaves, EPS, offset=offset)
            results.append((y, *torch.autograd.grad(y, leaves, dy.to(to))))
        exact, own, ours = results
        assert ours[0].is_contiguous()
        scales = (exact[0], *gradient_scales(x, weight, dy, offset))
        for what, scale, *values in zip(("y", "dx", "dweight"), scales, ours, own, exact, strict=True):
            assert_no_worse(*values, f"{what}, {layout}", scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_over_many_values(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    """Long rows and many of them, so that sums in a poor order would show."""
    x, weight, dy = torch.randn(50, 4099).to(dtype), torch.randn(4099).to(dtype), torch.randn(50, 4099).to(dtype)
    results = []
    for function, to in ((exact_norm, torch.float64), (transformers_norm, dtype), (None, dtype)):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight)]
        y = function(*leaves, 0.0) if function else rms_norm(*leaves, EPS)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(to))))
    exact, own, ours = results
    scales = (exact[0], *gradient_scales(x, weight, dy, 0.0))
    for what, scale, *values in zip(("y", "dx", "dweight"), scales, ours, own, exact, strict=True):
        assert_no_worse(*values, what, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_residual(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], D: int, dtype: torch.dtype
) -> None:
    for (layout, x), residual in itertools.product(layouts(D, dtype).items(), (False, True)):
        weight = torch.randn(D).to(dtype)
        stream = torch.randn_like(x) if residual else torch.randn(D, *x.shape[:-1]).to(dtype).movedim(0, -1)
        dy, dh = torch.randn_like(x), torch.randn_like(x)

        leaves = [t.detach().requires_grad_() for t in (x, stream, weight)]
        y, h = rms_norm(leaves[0], leaves[2], EPS, residual=leaves[1])
        assert torch.equal(h, x + stream)  # rounded once, as PyTorch does it
        ours = torch.autograd.grad((y, h), leaves, (dy, dh))

        results = []
        for function, to in ((exact_norm, torch.float64), (transformers_norm, dtype)):
            at, gamma = h.detach().to(to).requires_grad_(), weight.to(to).requires_grad_()
            out = function(at, gamma, 0.0)
            results.append((out, *torch.autograd.grad((out, at * 1), (at, gamma), (dy.to(to), dh.to(to)))))
        (exact_y, exact_dh, exact_dweight), (own_y, own_dh, own_dweight) = results
        assert_no_worse(y, own_y, exact_y, f"y, {layout}")
        scales = gradient_scales(h, weight, dy, 0.0)
        assert_no_worse(ours[0], own_dh, exact_dh, f"dx, {layout}", scales[0].abs() + dh.double().abs())
        assert torch.equal(ours[0], ours[1])
        assert_no_worse(ours[2], own_dweight, exact_dweight, f"dweight, {layout}", scales[1])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_only_gradients_asked_for(
    best_backend: str, backward_calls: list[tuple[bool, bool]], wanted: tuple[bool, ...], used: str
) -> None:
    """x, residual and weight: a gradient asked for has its value, another is None and is not computed."""
    leaves = [torch.randn(4, 9, 33).requires_grad_(wanted[0]), torch.randn(4, 9, 33).requires_grad_(wanted[1])]
    leaves.append(torch.randn(33).requires_grad_(wanted[2]))
    reference = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    x, residual, weight = leaves
    dy, dh = torch.randn(4, 9, 33), torch.randn(4, 9, 33)

    y, h = rms_norm(x, weight, EPS, residual=residual)
    exact_h = reference[0] + reference[1]
    exact_y = exact_norm(exact_h, reference[2], 0.0)
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
        elif truth.grad is None:  # the weight, where only h was used
            assert leaf.grad is None or not leaf.grad.any()
        else:
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)
    computed = any(wanted) and used != "h"
    assert backward_calls == ([(wanted[0] or wanted[1], wanted[2])] if computed else [])


def test_gradients_not_needed_are_empty(best_backend: str) -> None:
    dy, h, weight = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    for need_dx, need_dweight in itertools.product([False, True], repeat=2):
        dx, dweight = torch.ops.cogsym.rms_norm_backward(dy, h, weight, EPS, 0.0, None, need_dx, need_dweight)
        assert (dx.numel(), dweight.numel()) == (15 * need_dx, 5 * need_dweight)


@pytest.mark.parametrize("weight_dtype", DTYPES[:3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_of_another_dtype(
    cpu_backend: str, assert_no_worse: Callable[..., None], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight, dy = torch.randn(6, 65).to(dtype), torch.randn(65).to(weight_dtype), torch.randn(6, 65).to(dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = rms_norm(*leaves, EPS)
    y.backward(dy)
    own_leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    own = transformers_norm(*own_leaves, 0.0)
    own.backward(dy)
    truth = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = exact_norm(*truth, 0.0)
    exact.backward(dy.double())
    assert y.dtype == dtype and leaves[1].grad.dtype == weight_dtype
    assert_no_worse(y, own, exact, "y")
    scales = gradient_scales(x, weight, dy, 0.0)
    assert_no_worse(leaves[0].grad, own_leaves[0].grad, truth[0].grad, "dx", scales[0])
    assert_no_worse(leaves[1].grad, own_leaves[1].grad, truth[1].grad, "dweight", scales[1])


def test_residual_of_another_dtype(best_backend: str) -> None:
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8)
    y, h = rms_norm(x, weight, EPS, residual=residual)
    assert torch.equal(h, x.float() + residual)
    torch.testing.assert_close(y, exact_norm(h.double(), weight.double(), 0.0).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(cpu_backend: str, dtype: torch.dtype, value: float) -> None:
    """A row with NaN is NaN; one with an infinity is what the formula says: 0 elsewhere, NaN there."""
    x, weight, dy = torch.randn(5, 70).to(dtype), torch.randn(70).to(dtype), torch.randn(5, 70).to(dtype)
    x[2, 66] = value
    leaf = x.clone().requires_grad_()
    y = rms_norm(leaf, weight, EPS)
    y.backward(dy)
    exact = exact_norm(x.double(), weight.double(), 0.0)
    assert torch.equal(y.isnan(), exact.isnan())
    assert y[2].isnan().all() if value != value else (y[2, :66] == 0).all()
    assert y[[0, 1, 3, 4]].isfinite().all() and leaf.grad[[0, 1, 3, 4]].isfinite().all()
    assert leaf.grad[2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_rows(best_backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(6).to(dtype).requires_grad_()
    y, h = rms_norm(x, weight, EPS, residual=residual)
    (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_neither_run_nor_threads_nor_other_rows(cpu_backend: str, dtype: torch.dtype) -> None:
    x, weight, dy = torch.randn(301, 577).to(dtype), torch.randn(577).to(dtype), torch.randn(301, 577).to(dtype)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = rms_norm(*leaves, EPS)
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
    assert torch.equal(rms_norm(x[17:18], weight, EPS), first[0][17:18])


def test_gradcheck(cpu_backend: str) -> None:
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, offset=1.0), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: rms_norm(x, w, EPS, residual=r), (x, residual, weight))


def test_opcheck(best_backend: str) -> None:
    ops = torch.ops.cogsym
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for x in (torch.randn(2, 3, 8), torch.randn(2, 3, 8).transpose(0, 1), torch.randn(8, 6).t()):
        x, residual = (t.detach().requires_grad_() for t in (x, x * 2))
        torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS, 1.0))
        torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, EPS, 0.0))
        dy, dh = (torch.randn_like(t) for t in (x, x))
        for stream, dx, dweight in ((None, True, False), (dh, True, True), (None, False, True)):
            args = (dy, x.detach(), weight.detach(), EPS, 0.0, stream, dx, dweight)
            torch.library.opcheck(ops.rms_norm_backward.default, args)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        ((2, 8), (7,), None, r"weight has shape \(7,\), expected \(8,\)"),
        ((2, 8), (1, 8), None, r"weight has shape \(1, 8\), expected \(8,\)"),
        ((2, 8), (8,), (1, 8), r"residual has shape \(1, 8\), expected \(2, 8\)"),
    ],
)
def test_shapes_that_do_not_fit(x: tuple, weight: tuple, residual: tuple | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(x), torch.ones(weight), EPS, residual=None if residual is None else torch.ones(residual))
