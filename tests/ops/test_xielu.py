from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cogsym.ops import xielu, xielu_input_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (1, 7, 64, 576, 1027)
BETA, EPS = 0.5, -1e-6


def exact_xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """The formula of arXiv 2411.13010 in float64."""
    bend = torch.where(x < eps, torch.expm1(torch.where(x < eps, x, 0)), torch.expm1(x.new_tensor(eps))) - x
    return torch.where(x > 0, alpha_p * x * x, alpha_n * bend) + beta * x


def transformers_xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """transformers.activations.XIELUActivation, behind its softplus."""
    bound = x.new_tensor(eps)
    return torch.where(x > 0, alpha_p * x * x + beta * x, (torch.expm1(torch.min(x, bound)) - x) * alpha_n + beta * x)


def inputs(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """x on both sides of 0 and near it, and the alphas of Apertus at its start, moved."""
    x = torch.randn(shape) * torch.tensor([3.0, 0.1, 1e-3, 1e-6])[torch.randint(4, shape)]
    return [x.to(dtype), torch.rand(1).add(0.4).to(dtype), torch.rand(1).add(0.6).to(dtype)]


def layouts(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "contiguous": inputs(dtype, 3, 5, width)[0],
        "one row": inputs(dtype, width)[0],
        "slice": inputs(dtype, 3, 5, 2 * width + 1)[0][..., :width],
        "swapped": inputs(dtype, 5, 3, width)[0].transpose(0, 1),
        "columns": inputs(dtype, width, 15)[0].t(),
        "expanded": inputs(dtype, 1, width)[0].expand(5, width),
    }


def compare(assert_no_worse: Callable[..., None], x: Tensor, alphas: list[Tensor], what: str = "") -> None:
    dz, results = torch.randn_like(x), []
    for function, to in ((xielu, x.dtype), (transformers_xielu, x.dtype), (exact_xielu, torch.float64)):
        leaves = [t.detach().to(to).requires_grad_() for t in (x, *alphas)]
        z = function(*leaves, BETA, EPS)
        results.append((z, *torch.autograd.grad(z, leaves, dz.to(to))))
    assert results[0][0].is_contiguous()
    h, d = x.double(), dz.double().abs()
    terms = (
        h.abs() * (1 + h.abs()),
        d * (1 + 2 * h.abs()),
        (d * h.square()).sum(),
        (d * h.abs() * 2).sum(),
    )
    for name, scale, *values in zip(("z", "dx", "dalpha_p", "dalpha_n"), terms, *results, strict=True):
        assert_no_worse(*values, f"{name}, {what}", scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], width: int, dtype: torch.dtype
) -> None:
    for layout, x in layouts(width, dtype).items():
        compare(assert_no_worse, x, inputs(dtype, 1)[1:], layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_over_many_values(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    compare(assert_no_worse, *(lambda x, *alphas: (x, alphas))(*inputs(dtype, 101, 1027)))


def test_near_zero_nothing_cancels(cpu_backend: str) -> None:
    """e^x - 1 has all its digits where e^x is nearly 1, and between eps and 0 the bend is -x and e^eps - 1."""
    magnitude = torch.logspace(-30, 1.9, 4001, dtype=torch.float64)
    x = torch.cat((-magnitude, torch.zeros(1, dtype=torch.float64), magnitude)).float().requires_grad_()
    one = torch.ones(1)
    z = xielu(x, one, one, 0.0, EPS)
    (dx,) = torch.autograd.grad(z.sum(), x)
    h = x.detach().double()
    bound = h.clamp(max=EPS).expm1()
    terms = torch.where(h > 0, h.square(), bound.abs() + h.abs())
    exact = torch.where(h > 0, h.square(), bound - h)
    slope = torch.where(h > 0, 2 * h, torch.where(h < EPS, torch.expm1(h.clamp(max=0)), -1))
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    assert ((z.detach().double() - exact).abs() <= 4 * eps * terms + tiny).all()
    assert ((dx.double() - slope).abs() <= 4 * eps * slope.abs() + tiny).all()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_only_gradients_asked_for(best_backend: str, wanted: tuple[bool, ...]) -> None:
    tensors = inputs(torch.float32, 4, 33)
    leaves = [t.requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    reference = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    dz = torch.randn(4, 33)
    z = xielu(*leaves, BETA, EPS)
    assert z.requires_grad == any(wanted)
    if any(wanted):
        z.backward(dz)
        exact_xielu(*reference, BETA, EPS).backward(dz.double())
    for leaf, truth, wants in zip(leaves, reference, wanted, strict=True):
        assert (leaf.grad is not None) == wants
        if wants:
            torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)
    x, *alphas = (t.detach() for t in leaves)
    dx, dalphas = torch.ops.cogsym.xielu_backward(dz, x, *alphas, BETA, EPS, wanted[0], any(wanted[1:]))
    assert (dx.numel(), dalphas.numel()) == (x.numel() * wanted[0], 2 * any(wanted[1:]))


def test_gradient_without_autograd(best_backend: str) -> None:
    x, *alphas = inputs(torch.float32, 5, 33)
    dz, leaf = torch.randn(5, 33), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(xielu(leaf, *alphas, BETA, EPS), leaf, dz)
    assert torch.equal(xielu_input_gradient(dz, x, *alphas, BETA, EPS), expected)


def test_transformers_module(best_backend: str) -> None:
    """With its softplus under autograd, in float64: values and the gradients of its own parameters."""
    activations = pytest.importorskip("transformers.activations")
    module = activations.XIELUActivation(dtype=torch.float64)
    x, dz = inputs(torch.float64, 7, 40)[0], torch.randn(7, 40, dtype=torch.float64)
    alpha_p = torch.nn.functional.softplus(module.alpha_p)
    alpha_n = module.beta + torch.nn.functional.softplus(module.alpha_n)
    wanted = [x.requires_grad_(), module.alpha_p, module.alpha_n]
    ours = xielu(x, alpha_p, alpha_n, float(module.beta), float(module.eps))
    theirs = module(x)
    torch.testing.assert_close(ours, theirs)
    for got, truth in zip(*(torch.autograd.grad(z, wanted, dz) for z in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_they_are(cpu_backend: str, dtype: torch.dtype) -> None:
    x, alpha_p, alpha_n = inputs(dtype, 6, 37)
    dz = torch.randn(6, 37).to(dtype)
    x[0, 3], x[1, 4], x[2, 5] = torch.nan, torch.inf, -torch.inf
    leaf = x.clone().requires_grad_()
    z = xielu(leaf, alpha_p, alpha_n, BETA, EPS)
    (dx,) = torch.autograd.grad(z, leaf, dz)
    assert (~z.isfinite()).nonzero().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert z[0, 3].isnan() and z[1, 4] == torch.inf and z[2, 5].isnan()  # the last is infinity - infinity
    assert dx[0, 3].isnan() and dx[1, 4].isinf() and dx[2, 5].isfinite()
    assert (~dx.isfinite()).sum() == 2


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (3, 0)])
def test_no_elements(best_backend: str, shape: tuple[int, ...]) -> None:
    leaves = [torch.randn(shape, requires_grad=True), *(torch.ones(1, requires_grad=True) for _ in range(2))]
    xielu(*leaves, BETA, EPS).sum().backward()
    assert leaves[0].grad.shape == shape and not leaves[1].grad.any() and not leaves[2].grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_neither_run_nor_threads_nor_other_rows(cpu_backend: str, dtype: torch.dtype) -> None:
    x, *alphas = inputs(dtype, 133, 1027)
    dz = torch.randn_like(x)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *alphas)]
        z = xielu(*leaves, BETA, EPS)
        return [z.detach(), *torch.autograd.grad(z, leaves, dz)]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    if cpu_backend == "reference":
        return  # PyTorch's vector and scalar code differ in the last place
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(xielu(x[77:78], *alphas, BETA, EPS), first[0][77:78])


def test_gradcheck(cpu_backend: str) -> None:
    x, *alphas = (t.requires_grad_() for t in inputs(torch.float64, 3, 7))
    away = (x.detach() + 0.01 * x.detach().sign()).requires_grad_()  # from the two places where it bends
    assert torch.autograd.gradcheck(lambda *t: xielu(*t, BETA, EPS), (away, *alphas))


def test_opcheck(best_backend: str) -> None:
    ops = torch.ops.cogsym
    for x in (torch.randn(3, 8), torch.randn(2, 3, 16)[..., :8], torch.randn(8, 3).t()):
        leaves = [t.detach().requires_grad_() for t in (x, *inputs(torch.float32, 1)[1:])]
        torch.library.opcheck(ops.xielu.default, (*leaves, BETA, EPS))
        dz = torch.randn_like(x)
        for needed in itertools.product([False, True], repeat=2):
            args = (dz, *(t.detach() for t in leaves), BETA, EPS, *needed)
            torch.library.opcheck(ops.xielu_backward.default, args)


def test_alphas_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"alpha_n has shape \(2,\), expected one element"):
        xielu(torch.ones(2, 8), torch.ones(()), torch.ones(2), BETA, EPS)
