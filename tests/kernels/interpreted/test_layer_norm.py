import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import layer_norm as launch
from cogsym.ops import operations
from cogsym.ops.layer_norm import add_layer_norm_reference, layer_norm_backward_reference, layer_norm_reference

WIDTHS = (1, 7, 96, 1027)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
)
EPS = 1e-5
Random = Callable[..., Tensor]
Check = Callable[..., None]
kernels = importlib.import_module("cogsym.kernels.layer_norm")
dtypes = pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=[(D, False) for D in WIDTHS] + [(7, True), (150, True)], ids=lambda p: f"{p[0]}{' loop' * p[1]}")
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every width as whole rows, two by the loops over columns that are meant for long ones."""
    if request.param[1]:
        for name, value in (("LONGEST_ROW", 0), ("LONGEST_ROW_BACKWARD", 0), ("COLUMN_BLOCK", 64)):
            monkeypatch.setattr(kernels, name, value)
    return request.param[0]


def scales(h: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes of the terms of y and of dx."""
    h, weight, dy = h.double(), weight.double(), dy.double()
    r = (h.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
    n = (h.abs() + h.mean(-1, keepdim=True).abs()) * r
    g = (dy * (1 + weight.abs())).abs()
    return n * (1 + weight.abs()) + 1, r * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))


@dtypes
@pytest.mark.parametrize(("with_bias", "offset"), [(False, 0.0), (True, 1.0)])
def test_forward(
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    with_bias: bool,
    offset: float,
    random: Random,
    assert_no_worse: Check,
) -> None:
    x, residual = (random(3, 5, width, dtype=dtype) + 1 for _ in range(2))
    weight, bias = random(width, dtype=weight_dtype), random(width, dtype=weight_dtype) if with_bias else None
    double = weight.double(), None if bias is None else bias.double()
    terms, _ = scales(x, weight, x)
    y = launch.layer_norm(x, weight, bias, EPS, offset)
    plain = layer_norm_reference(x, weight, bias, EPS, offset)
    assert_no_worse(y, plain, layer_norm_reference(x.double(), *double, EPS, offset), 2 * terms)
    y, h = launch.add_layer_norm(x, residual, weight, bias, EPS, offset)
    plain, exact_h = add_layer_norm_reference(x, residual, weight, bias, EPS, offset)
    assert torch.equal(h, exact_h)
    terms, _ = scales(h, weight, h)
    assert_no_worse(y, plain, layer_norm_reference(h.double(), *double, EPS, offset), 2 * terms)


@dtypes
@pytest.mark.parametrize("with_dh", [False, True])
def test_backward(
    width: int, dtype: torch.dtype, weight_dtype: torch.dtype, with_dh: bool, random: Random, assert_no_worse: Check
) -> None:
    h, dy = random(3, 5, width, dtype=dtype) + 1, random(3, 5, width, dtype=dtype)
    weight, dh = random(width, dtype=weight_dtype), random(3, 5, width, dtype=dtype) if with_dh else None
    everything = True, True, True
    got = launch.layer_norm_backward(dy, h, weight, EPS, 0.0, dh, *everything)
    plain = layer_norm_backward_reference(dy, h, weight, EPS, 0.0, dh, *everything)
    double = (t if t is None else t.double() for t in (dy, h, weight))
    truth = layer_norm_backward_reference(*double, EPS, 0.0, None if dh is None else dh.double(), *everything)
    _, dx = scales(h, weight, dy)
    rows = dy.double().abs().reshape(-1, width)
    n = scales(h, torch.zeros(width), dy)[0].reshape(-1, width)
    for one, other, exact, terms in zip(got, plain, truth, (2 * dx, 2 * (rows * n).sum(0), rows.sum(0)), strict=True):
        assert_no_worse(one, other, exact, terms)
    # Each alone has the same bits, and what was not asked for is not there.
    for needs in itertools.product([False, True], repeat=3) if width < 100 else ():
        alone = launch.layer_norm_backward(dy, h, weight, EPS, 0.0, dh, *needs)
        for one, other, needed in zip(alone, got, needs, strict=True):
            assert torch.equal(one, other) if needed else one.numel() == 0


def test_strides_change_no_bit(random: Random) -> None:
    wide = [random(2, 3, 40) for _ in range(4)]
    strided, weight = [t[..., 3:24] for t in wide], random(21)
    plain = [t.contiguous() for t in strided]
    for x, residual in ((strided[0], plain[1]), (plain[0], strided[1])):
        for one, other in zip(
            launch.add_layer_norm(x, residual, weight, None, EPS, 0.0),
            launch.add_layer_norm(*plain[:2], weight, None, EPS, 0.0),
            strict=True,
        ):
            assert one.is_contiguous() and torch.equal(one, other)
    got = launch.layer_norm_backward(strided[0], strided[1], weight, EPS, 0.0, strided[2], True, True, True)
    want = launch.layer_norm_backward(plain[0], plain[1], weight, EPS, 0.0, plain[2], True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_mean_that_is_large_beside_the_spread(random: Random) -> None:
    x = random(4, 300) + 5000
    exact = layer_norm_reference(x.double(), torch.ones(300), None, EPS, 0.0)
    torch.testing.assert_close(launch.layer_norm(x, torch.ones(300), None, EPS, 0.0).double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape), torch.ones(shape[-1])
    assert launch.layer_norm(x, weight, weight, EPS, 0.0).shape == shape
    dx, dweight, dbias = launch.layer_norm_backward(x, x, weight, EPS, 0.0, x, True, True, True)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(weight))


def test_public_operation_launches_the_kernels(random: Random) -> None:
    for name in ("layer_norm", "add_layer_norm", "layer_norm_backward"):
        assert operations()[name].implementation(torch.zeros(1)) is getattr(launch, name)
    leaves = [random(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3), (2, 3), (3,), (3,))]
    assert torch.autograd.gradcheck(lambda x, r, w, b: cogsym.ops.layer_norm(x, w, b, EPS, residual=r), leaves)
