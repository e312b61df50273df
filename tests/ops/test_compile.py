"""The operations inside `torch.compile`: one graph, and the values of eager mode."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from cogsym.ops import gated_activation, rms_norm, rotary

# (compiler, which of x, residual and weight are trained); inductor takes seconds, so once
CASES = [
    ("aot_eager", (True, True, True)),
    ("aot_eager", (True, False, False)),
    ("aot_eager", (False, False, True)),
    pytest.param(
        "inductor",
        (True, True, True),
        marks=pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler"),
    ),
]


def small_block(x: Tensor, residual: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y, h = rms_norm(x, weight, 1e-6, residual=residual)
    heads = rotary(y.unflatten(-1, (2, -1)), cos, sin).flatten(-2)
    gate, up = torch.cat((heads, rms_norm(h, weight, 1e-6, offset=1.0)), -1).chunk(2, -1)
    return gated_activation(gate, up, "silu") + gated_activation(
        gate * 2, up.transpose(0, 1).transpose(0, 1), "gelu_tanh"
    )


@pytest.mark.parametrize(("compiler", "trained"), CASES)
def test_one_graph_and_equal_values(best_backend: str, compiler: str, trained: tuple[bool, ...]) -> None:
    torch.compiler.reset()
    tables = [t.reshape(1, 3, 4) for t in (torch.randn(12), torch.randn(12))]
    shapes = ((2, 3, 16), (2, 3, 16), (16,))
    leaves = [torch.randn(shape).requires_grad_(wants) for shape, wants in zip(shapes, trained, strict=True)]
    compiled = torch.compile(small_block, fullgraph=True, backend=compiler)
    results = []
    for function in (small_block, compiled):
        y = function(*leaves, *tables)
        wanted = [t for t in leaves if t.requires_grad]
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)
