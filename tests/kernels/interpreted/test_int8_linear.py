from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import int8_linear as launch
from cogsym.ops import operations
from cogsym.ops.int8_linear import (
    int8_linear_input_gradient_reference,
    int8_linear_reference,
    quantise,
)

Random = Callable[..., Tensor]
Check = Callable[..., None]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 65, 40), (3, 33, 257), (32, 20, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(shape: tuple[int, int, int], dtype: torch.dtype, random: Random, assert_no_worse: Check) -> None:
    """Rows that are strided, a weight whose rows are, with a bias and without."""
    rows, outputs, inputs = shape
    x, dy = random(rows, 2 * inputs, dtype=dtype)[:, inputs:], random(rows, 2 * outputs, dtype=dtype)[:, :outputs]
    weight, scale = quantise(random(outputs, inputs) * random(outputs, 1).abs())
    weight = torch.cat([weight, weight], 1)[:, :inputs]
    wide = weight.double() * scale.double()[:, None]
    for bias in (None, random(outputs, dtype=dtype)):
        plain, b = int8_linear_reference(x, weight, scale, bias), 0 if bias is None else bias.double()
        terms = x.double().abs() @ wide.t().abs() + (b if bias is None else b.abs())
        assert_no_worse(launch.int8_linear(x, weight, scale, bias), plain, x.double() @ wide.t() + b, terms)
    plain = int8_linear_input_gradient_reference(dy, weight, scale)
    terms = dy.double().abs() @ wide.abs()
    assert_no_worse(launch.int8_linear_input_gradient(dy, weight, scale), plain, dy.double() @ wide, terms)


def test_few_rows_take_it_and_many_the_product_of_a_widened_weight(random: Random) -> None:
    weight, scale = quantise(random(6, 5))
    for rows, backend in ((32, "triton"), (33, "reference")):
        x = random(2, rows // 2, 5) if rows == 32 else random(rows, 5)
        x.requires_grad_()
        for name in ("int8_linear", "int8_linear_input_gradient"):
            assert operations()[name].route(torch.device("cpu"), x.dtype, rows=rows).backend == backend
        cogsym.ops.int8_linear(x, weight, scale).sum().backward()
        torch.testing.assert_close(x.grad, (weight * scale[:, None]).sum(0).expand_as(x))
    assert cogsym.ops.int8_linear(random(0, 5), weight, scale).shape == (0, 6)
    assert operations()["int8_linear"].route(torch.device("cpu"), torch.float64).backend == "reference"
