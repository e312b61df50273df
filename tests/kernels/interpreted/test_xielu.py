import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import xielu as launch
from cogsym.ops import operations
from cogsym.ops.xielu import xielu_backward_reference, xielu_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BETA, EPS = 0.5, -1e-6
Random = Callable[..., Tensor]
Check = Callable[..., None]


def inputs(random: Random, dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """dz, x on both sides of 0 and near it, and the alphas."""
    x = 2 * random(*shape) ** 3
    return [random(*shape, dtype=dtype), x.to(dtype), *(torch.full((1,), v).to(dtype) for v in (0.8, 0.9))]


@pytest.mark.parametrize("F", [1, 7, 64, 576, 1027])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_values(F: int, dtype: torch.dtype, strided: bool, random: Random, assert_no_worse: Check) -> None:
    dz, x, *alphas = inputs(random, dtype, 3, 2, 2 * F)
    dz, x = (t[..., :F] if strided else t[..., :F].contiguous() for t in (dz, x))
    double = [t.double() for t in (dz, x, *alphas)]
    h, d = x.double().abs(), dz.double().abs()
    y = launch.xielu(x, *alphas, BETA, EPS)
    assert_no_worse(
        y, xielu_reference(x, *alphas, BETA, EPS), xielu_reference(*double[1:], BETA, EPS), h + 2 * h.square()
    )
    both = launch.xielu_backward(dz, x, *alphas, BETA, EPS, True, True)
    plain = xielu_backward_reference(dz, x, *alphas, BETA, EPS, True, True)
    truth = xielu_backward_reference(*double, BETA, EPS, True, True)
    for got, other, exact, terms in zip(both, plain, truth, (d * (1 + 2 * h), (d * h * (1 + h)).sum()), strict=True):
        assert_no_worse(got, other, exact, terms)
    # Each alone has the same bits, and what was not asked for is not there.
    for needs in itertools.product([False, True], repeat=2):
        alone = launch.xielu_backward(dz, x, *alphas, BETA, EPS, *needs)
        for one, other, needed in zip(alone, both, needs, strict=True):
            assert torch.equal(one, other) if needed else one.numel() == 0


def test_near_zero_nothing_cancels() -> None:
    x = -torch.logspace(-5.9, 1.9, 2001, dtype=torch.float64).float()
    y = launch.xielu(x, torch.ones(1), torch.ones(1), 0.0, EPS).double()
    exact = torch.expm1(x.double()) - x.double()
    assert ((y - exact).abs() <= torch.where(x > -0.3, 1e-6, 1e-5) * exact).all()  # e^x - 1 has still lost little there


def test_nan_stays_where_it_is(random: Random) -> None:
    dz, x, *alphas = inputs(random, torch.float32, 3, 7)
    dz[0, 1] = x[1, 2] = torch.nan
    assert torch.equal(launch.xielu(x, *alphas, BETA, EPS).isnan(), x.isnan())
    dx, _ = launch.xielu_backward(dz, x, *alphas, BETA, EPS, True, False)
    assert torch.equal(dx.isnan(), dz.isnan() | x.isnan())


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    x, one = torch.zeros(shape), torch.ones(1)
    assert launch.xielu(x, one, one, BETA, EPS).shape == shape
    dx, dalphas = launch.xielu_backward(x, x, one, one, BETA, EPS, True, True)
    assert dx.shape == shape and torch.equal(dalphas, torch.zeros(2))


def test_public_operation_launches_the_kernels(random: Random) -> None:
    for name in ("xielu", "xielu_backward"):
        assert operations()[name].implementation(torch.zeros(1)) is getattr(launch, name)
    _, x, *alphas = inputs(random, torch.float64, 2, 3)
    leaves = [t.requires_grad_() for t in (x + 0.01 * x.sign(), *alphas)]
    assert torch.autograd.gradcheck(lambda *t: cogsym.ops.xielu(*t, BETA, EPS), leaves)
