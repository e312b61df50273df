import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import rms_norm as launch
from cogsym.ops import operations
from cogsym.ops.rms_norm import add_rms_norm_reference, rms_norm_backward_reference, rms_norm_reference

kernels = importlib.import_module("cogsym.kernels.rms_norm")
WIDTHS = (1, 7, 64, 96, 576, 1027)
# dtypes of x and of the weight
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
)
EPS = 1e-5
Random = Callable[..., Tensor]
Check = Callable[..., None]

dtypes = pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as short as those of the tests go through the loops that are meant for long ones."""
    monkeypatch.setattr(kernels, "LONGEST_ROW", 0)
    monkeypatch.setattr(kernels, "LONGEST_ROW_BACKWARD", 0)
    monkeypatch.setattr(kernels, "COLUMN_BLOCK", 64)


@pytest.fixture(params=["whole rows", "column loop"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "column loop":
        read_in_blocks(monkeypatch)


@pytest.fixture(params=[(D, False) for D in WIDTHS] + [(7, True), (150, True)], ids=lambda p: f"{p[0]}{' loop' * p[1]}")
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every width as whole rows, two by the column loop."""
    if request.param[1]:
        read_in_blocks(monkeypatch)
    return request.param[0]


@dtypes
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1.0, 300.0)])
def test_forward(
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    offset: float,
    scale: float,
    random: Random,
    assert_no_worse: Check,
) -> None:
    x, weight = (scale * random(5, width)).to(dtype), random(width, dtype=weight_dtype)
    truth = rms_norm_reference(x.double(), weight.double(), EPS, offset)
    assert_no_worse(launch.rms_norm(x, weight, EPS, offset), rms_norm_reference(x, weight, EPS, offset), truth)


@dtypes
def test_residual_is_added_and_rounded_first(
    width: int, dtype: torch.dtype, weight_dtype: torch.dtype, random: Random
) -> None:
    x, residual, weight = (
        random(5, width, dtype=dtype),
        random(5, width, dtype=dtype),
        random(width, dtype=weight_dtype),
    )
    y, h = launch.add_rms_norm(x, residual, weight, EPS, 1.0)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, launch.rms_norm(h, weight, EPS, 1.0))


@dtypes
def test_backward(
    width: int, dtype: torch.dtype, weight_dtype: torch.dtype, random: Random, assert_no_worse: Check
) -> None:
    dy, h, dh = (random(11, width, dtype=dtype) for _ in range(3))
    weight = random(width, dtype=weight_dtype)
    r = (h.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    dx_terms = r * dy.double() * (1.0 + weight.double())
    dweight_terms = (r * dy.double() * h.double()).abs().sum(0)
    for added in (None, dh):
        plain = rms_norm_backward_reference(dy, h, weight, EPS, 1.0, added, True, True)
        double = None if added is None else added.double()
        truth = rms_norm_backward_reference(dy.double(), h.double(), weight.double(), EPS, 1.0, double, True, True)
        dx, dweight = launch.rms_norm_backward(dy, h, weight, EPS, 1.0, added, True, True)
        assert_no_worse(dx, plain[0], truth[0], dx_terms)
        assert_no_worse(dweight, plain[1], truth[1], dweight_terms)


@pytest.mark.parametrize("D", [7, 64, 96])
def test_programs_share_the_rows(D: int, loop: None, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, each row is read once: dx has the same bits, and dweight is the same sum; whether the
    next row is on its way while one is computed or not."""
    dy, h, dh, weight = random(75, D), random(75, D), random(75, D), random(D)
    results = []
    for warps, prefetched in ((1, D), (1, 0), (4, D), (10**6, D)):
        monkeypatch.setattr(kernels, "BACKWARD_WARPS_PER_MULTIPROCESSOR", warps)
        monkeypatch.setattr(kernels, "LONG_BACKWARD_WARPS_PER_MULTIPROCESSOR", warps)
        monkeypatch.setattr(kernels, "LONGEST_ROW_PREFETCHED", prefetched)
        results.append(launch.rms_norm_backward(dy, h, weight, EPS, 0.0, dh, True, True))
    for dx, dweight in results:
        assert torch.equal(dx, results[0][0])
        for got, plain in zip(
            (dx, dweight), rms_norm_backward_reference(dy, h, weight, EPS, 0.0, dh, True, True), strict=True
        ):
            torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_each_gradient_alone_has_the_same_bits(needs: tuple[bool, bool], loop: None, random: Random) -> None:
    dy, h, dh, weight = random(11, 96), random(11, 96), random(11, 96), random(96)
    both = launch.rms_norm_backward(dy, h, weight, EPS, 1.0, dh, True, True)
    alone = launch.rms_norm_backward(dy, h, weight, EPS, 1.0, dh, *needs)
    for got, full, needed in zip(alone, both, needs, strict=True):
        assert torch.equal(got, full) if needed else got.shape == (0,)


LAYOUTS = {
    "half of a fused product": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "heads of a fused projection": lambda t: torch.cat((t, t), 2)[:, :, : t.shape[2]],
    "heads before positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [7, 70])
def test_strides_change_no_bit(layout: str, D: int, loop: None, random: Random) -> None:
    x, residual, dy, dh = (random(2, 3, 2, D) for _ in range(4))
    weight = random(D)
    lay = LAYOUTS[layout]
    strided_weight = weight.repeat_interleave(2)[::2]
    assert not lay(x).is_contiguous()
    assert torch.equal(lay(x), x)
    results = (
        (launch.rms_norm(lay(x), strided_weight, EPS, 0.0),),
        launch.add_rms_norm(lay(x), residual, strided_weight, EPS, 0.0),
        launch.add_rms_norm(x, lay(residual), strided_weight, EPS, 0.0),
        launch.rms_norm_backward(lay(dy), x, strided_weight, EPS, 0.0, lay(dh), True, True),
        launch.rms_norm_backward(dy, lay(x), strided_weight, EPS, 0.0, dh, True, True),
    )
    add = launch.add_rms_norm(x, residual, weight, EPS, 0.0)
    backward = launch.rms_norm_backward(dy, x, weight, EPS, 0.0, dh, True, True)
    expected = ((launch.rms_norm(x, weight, EPS, 0.0),), add, add, backward, backward)
    for got, wanted in zip(itertools.chain(*results), itertools.chain(*expected), strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("D", [7, 96])
def test_nan_stays_in_its_row(D: int, loop: None, random: Random) -> None:
    dy, x, weight = random(9, D), random(9, D), random(D)
    x[4, D // 2] = torch.nan
    nan_rows = torch.arange(9) == 4
    y, h = launch.add_rms_norm(x, dy, weight, EPS, 0.0)
    assert torch.equal(y.isnan(), nan_rows[:, None].expand(9, D))
    assert torch.equal(h.isnan(), x.isnan())
    assert torch.equal(launch.rms_norm(x, weight, EPS, 0.0).isnan(), y.isnan())
    dx, dweight = launch.rms_norm_backward(dy, x, weight, EPS, 0.0, None, True, True)
    assert torch.equal(dx.isnan(), y.isnan())
    assert dweight.isnan().all()


def test_rows_beyond_the_end_add_nothing_without_eps(random: Random) -> None:
    dy, x, weight = random(5, 64), random(5, 64), random(64)
    for got in launch.rms_norm_backward(dy, x, weight, 0.0, 0.0, None, True, True):
        assert got.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (4, 0)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape), torch.ones(shape[-1])
    assert launch.rms_norm(x, weight, EPS, 0.0).shape == shape
    assert [t.shape for t in launch.add_rms_norm(x, x, weight, EPS, 0.0)] == [shape, shape]
    dx, dweight = launch.rms_norm_backward(x, x, weight, EPS, 0.0, x, True, True)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_public_operation_launches_the_kernels() -> None:
    for name in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
        assert operations()[name].implementation(torch.zeros(1)) is getattr(launch, name)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_gradients(needs: tuple[bool, ...], dtype: torch.dtype, random: Random, assert_no_worse: Check) -> None:
    inputs = [random(2, 5, 96, dtype=dtype), random(2, 5, 96, dtype=dtype), random(96)]
    dy, dh = random(2, 5, 96, dtype=dtype), random(2, 5, 96, dtype=dtype)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], cast: torch.dtype | None) -> list[Tensor]:
        leaves = [t.to(cast or t.dtype, copy=True).requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        outputs = function(*leaves)
        wanted = [(o, g.to(o.dtype)) for o, g in zip(outputs, (dy, dh), strict=True) if o.requires_grad]
        torch.autograd.backward(*zip(*wanted, strict=True))
        assert [leaf.grad is not None for leaf in leaves] == list(needs)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def operation(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return cogsym.ops.rms_norm(x, weight, EPS, residual=residual, offset=1.0)

    def reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm_reference(x, residual, weight, EPS, 1.0)

    plain, truth = gradients(reference, None), gradients(reference, torch.float64)
    for got, expected, true in zip(gradients(operation, None), plain, truth, strict=True):
        assert_no_worse(got, expected, true)


def test_public_gradients_by_finite_differences(random: Random, loop: None) -> None:
    x, residual, weight = (random(*shape, dtype=torch.float64) for shape in ((2, 3), (2, 3), (3,)))
    for t in (x, residual, weight):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: cogsym.ops.rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: cogsym.ops.rms_norm(x, w, EPS, residual=r), (x, residual, weight))
