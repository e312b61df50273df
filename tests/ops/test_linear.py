from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, linear, linear_input_gradient, route
from cogsym.ops.linear import multiply_into

HALF = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALF)
# (rows, outputs, inputs): numbers of rows that each loop takes, odd sizes, sizes of one, more than a block of each.
SHAPES = (
    (1, 1, 1),
    (1, 25, 67),
    (2, 9, 33),
    (3, 49, 130),
    (6, 30, 31),
    (7, 26, 41),
    (15, 24, 7),
    (17, 50, 64),
    (31, 23, 35),
    (33, 5, 1),
    (65, 1029, 330),
    (1300, 37, 19),
)


@pytest.fixture
def slow_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which the kernel is to multiply 16 bits of equal types too."""
    monkeypatch.setattr(sys.modules["cogsym.ops.linear"], "native", lambda dtype: dtype not in HALF)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the precision that is promised: products and sums in float32, rounded once."""
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, weight.dtype))
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


@pytest.mark.parametrize("dtype", (*TYPES, torch.float64))
@pytest.mark.parametrize("weight_dtype", TYPES)
def test_values_and_gradients(
    cpu_backend: str,
    slow_halves: None,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    for (rows, outputs, inputs), with_bias in itertools.product(SHAPES, (True, False)):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(weight_dtype)
        bias = torch.randn(outputs).to(weight_dtype) if with_bias else None
        dy = torch.randn(rows, outputs).to(dtype)
        exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        scale = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
        what = f"{rows} x {inputs} -> {outputs}"
        assert_no_worse(linear(x, weight, bias), plain(x, weight, bias), exact, f"y, {what}", scale)
        dx, scale = dy.double() @ weight.double(), dy.double().abs() @ weight.double().abs()
        wide = plain(dy, weight.t(), None)
        assert_no_worse(linear_input_gradient(dy, weight), wide, dx, f"dx, {what}", scale)


@pytest.mark.parametrize("weight_dtype", HALF)
def test_many_rows_by_widened_blocks(
    monkeypatch: pytest.MonkeyPatch, poisoned: None, assert_no_worse: Callable[..., None], weight_dtype: torch.dtype
) -> None:
    """Two blocks of the weight, of unequal sizes, their memory first made where nothing has a gradient."""
    if reason := backend.unavailable("cpp"):
        pytest.skip(f"plain PyTorch's product is used, as {reason}")
    module = sys.modules["cogsym.ops.linear"]
    monkeypatch.setattr(module, "_library_leads", lambda: True)
    widened = []
    by_blocks = module._by_blocks
    monkeypatch.setattr(module, "_by_blocks", lambda *given: (widened.append(given[1].shape), by_blocks(*given))[1])
    rows, outputs, inputs = 513, 1101, 700
    x, dy = torch.randn(rows, 3 * inputs)[:, inputs : 2 * inputs], torch.randn(rows, outputs)
    weight, bias = torch.randn(outputs, inputs + 5).to(weight_dtype)[:, 5:], torch.randn(outputs).to(weight_dtype)
    with torch.inference_mode():
        linear(x, weight)
    for given in (bias, None):
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        leaf = x.clone().requires_grad_()
        y = linear(leaf, weight, given)
        assert_no_worse(y.detach(), plain(x, weight, given), exact, "y", exact.abs())
        y.backward(dy)
        assert leaf.grad is not None
        assert_no_worse(leaf.grad, plain(dy, weight.t(), None), dy.double() @ weight.double(), "dx")
    assert widened == [weight.shape] * 5
    x[-1, 1] = torch.inf
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight.float()), equal_nan=True)


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=3)])
def test_each_gradient(cpu_backend: str, needs: tuple[bool, bool, bool]) -> None:
    inputs = [torch.randn(5, 4, 13), torch.randn(7, 13).bfloat16(), torch.randn(7)]
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    y = linear(*leaves)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    dy = torch.randn(5, 4, 7)
    y.backward(dy)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    F.linear(*exact).backward(dy.double())
    for leaf, other in zip(leaves, exact, strict=True):
        assert (leaf.grad is None) != leaf.requires_grad
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            bound = 1e-2 if leaf.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 20, 70])
def test_strided_rows(cpu_backend: str, transposed: bool, rows: int) -> None:
    """A slice of a wider product is read where it lies, and so are some of a weight's rows and columns."""
    x = torch.randn(rows, 3 * 40)[:, 40:80]
    weight = torch.randn(90, 50).bfloat16()[3:80:2, 5:45] if transposed else torch.randn(43, 90).bfloat16()[3:, 5:44]
    got = linear(x, weight) if transposed else linear_input_gradient(x, weight)
    exact = x.double() @ (weight.double().t() if transposed else weight.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_empty_ones(cpu_backend: str) -> None:
    weight, bias = torch.randn(6, 5).bfloat16(), torch.randn(6)
    assert linear(torch.randn(2, 3, 5), weight, bias).shape == (2, 3, 6)
    assert linear(torch.randn(5), weight).shape == (6,)
    assert linear(torch.randn(0, 5), weight).shape == (0, 6)
    assert linear(torch.randn(4, 5), weight[:0]).shape == (4, 0)
    assert torch.equal(linear(torch.randn(4, 0), weight[:, :0], bias), bias.expand(4, 6))


@pytest.mark.parametrize("rows", [1, 5, 9, 40])
def test_infinities_and_nan_stay_in_their_rows(cpu_backend: str, rows: int) -> None:
    x, weight = torch.randn(rows, 67), torch.randn(29, 67).bfloat16()
    weight[3, 66], weight[11, 0], x[-1, 1] = torch.nan, torch.inf, torch.inf
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight.float()), equal_nan=True)
    dy = torch.randn(rows, 29)
    torch.testing.assert_close(linear_input_gradient(dy, weight), dy @ weight.float(), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_do_not_change_a_bit(cpu_backend: str, threads: int) -> None:
    if cpu_backend == "reference":
        pytest.skip("PyTorch does not promise it")
    before = torch.get_num_threads()
    for rows in (2, 12, 100):
        x, weight = torch.randn(rows, 700), torch.randn(300, 700).bfloat16()
        try:
            torch.set_num_threads(1)
            one = linear(x, weight)
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, weight), one)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_into_memory_that_is_there(cpu_backend: str, dtype: torch.dtype, transposed: bool) -> None:
    x, weight = torch.randn(21, 18).to(dtype), torch.randn(18, 18).bfloat16().to(dtype)
    if dtype == torch.float32:
        weight = weight.bfloat16()
    out = torch.full((21, 18), torch.nan, dtype=dtype)
    assert multiply_into(out, x, weight, transposed).data_ptr() == out.data_ptr()
    exact = x.double() @ (weight.double().t() if transposed else weight.double())
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)


def test_where_pytorch_is_as_fast_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor multiplies itself is left to it, and so is every other device."""
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    module, cpu, half, single = sys.modules["cogsym.ops.linear"], torch.device("cpu"), torch.bfloat16, torch.float32
    for native in (True, False):
        monkeypatch.setattr(module, "native", lambda dtype, native=native: dtype not in HALF or native)
        here = native or backend.unavailable("cpp") is not None
        assert (route("linear", cpu, half, weight_dtype=half).backend == "reference") == here
        assert route("linear", cpu, single, weight_dtype=single, rows=100).backend == "reference"
    assert route("linear", torch.device("cuda"), single, weight_dtype=half).backend == "reference"
    assert route("linear", cpu, torch.float64, weight_dtype=half).backend == "reference"


def test_with_pytorchs_product_a_tracer_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGSYM_BACKEND", "reference")
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x, w: linear(x, w))(torch.randn(2, 3), torch.randn(4, 3))
    assert not any("cogsym" in str(node.target) for node in graph.graph.nodes)
