"""Tensors of more than 2³¹ elements in bfloat16: places are 64 bits wide. Only with --huge, 5 to 10 GB each."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest
import torch
from torch import Tensor

from cogsym.ops import (
    AttentionOptions,
    activation,
    attention,
    decode_attention,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
    token_scores,
    xielu,
)

WIDTH = 1024
ROWS = 2**31 // WIDTH + 3
TAIL = 5  # rows at the end, which are computed by themselves, too


@pytest.fixture(autouse=True)
def enough_memory(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--huge"):
        pytest.skip("asked for with --huge")
    gigabytes, free = 11, psutil.virtual_memory().available / 1e9
    if free < gigabytes:
        pytest.skip(f"{free:.1f} GB of memory are free, expected {gigabytes}")


def huge(*shape: int) -> Tensor:
    """Zeros but for the end, which is random; pages of zeros that are only read take no memory."""
    x = torch.zeros(shape, dtype=torch.bfloat16)
    x[-TAIL:] = torch.randn(TAIL, *shape[1:])
    assert x.numel() > 2**31
    return x


cos, sin = (torch.randn(1, 1, 64) for _ in range(2))
one = torch.ones(WIDTH, dtype=torch.bfloat16)
alpha = torch.ones(1)
square = torch.randn(8, WIDTH).bfloat16() / 32
BY_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, one, 1e-6),
    "layer_norm": lambda x: layer_norm(x, one, None, 1e-6),
    "gated_activation": lambda x: activation(x, "silu"),
    "xielu": lambda x: xielu(x, alpha, alpha, 0.5, -1e-6),
    "rotary": lambda x: rotary(x.view(-1, 1, 8, 128), cos, sin).view(-1, WIDTH),
    "attention": lambda x: attention(*x.view(-1, 2, 4, 128).split((2, 1, 1), 2), AttentionOptions(0.1))[0],
    "linear": lambda x: linear(x, square.float()),
    "linear_cross_entropy": lambda x: linear_cross_entropy(
        x, square, torch.ones(len(x), dtype=torch.int64), reduction="none"
    ),
    "token_scores": lambda x: token_scores(x, square, torch.ones(len(x), dtype=torch.int64)).loss,
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_the_end_of_many_rows(name: str) -> None:
    x = huge(ROWS, WIDTH)
    assert torch.equal(BY_ROWS[name](x)[-TAIL:], BY_ROWS[name](x[-TAIL:].clone()))


def test_the_end_of_a_store() -> None:
    store = huge(ROWS * 8, 1, 128)
    q, ends = torch.randn(2, 4, 128).bfloat16(), torch.tensor([[len(store)], [len(store) - 1]])
    options = AttentionOptions(0.1)
    got = decode_attention(q, store, store, ends - 4, ends, options)
    near = store[-TAIL:].clone()
    assert torch.equal(
        got, decode_attention(q, near, near, ends - len(store) + TAIL - 4, ends - len(store) + TAIL, options)
    )
