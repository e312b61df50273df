"""The CUDA half of cogsym.ops.flash by value: aten's operations have stand-ins on CPU tensors that keep their contract.

Signatures and layouts are those of aten/src/ATen/native/transformers/cuda/attention.cu for whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cogsym.ops import flash
from cogsym.ops.attention import attention_backward_reference, attention_reference

B, T, D = 2, 13, 16


def keys_seen(left: int | None, right: int | None) -> int | None:
    """The window, of how many keys before and behind its own a query sees."""
    assert right == 0
    return None if left in (None, -1) else left + 1


def forward(
    q: Tensor, k: Tensor, v: Tensor, cum_q: Any, cum_k: Any, most_q: int, most_k: int, dropout: float, causal: bool,
    mask: bool, *, scale: float, window_size_left: int | None = None, window_size_right: int | None = None, **rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert (cum_q, cum_k, most_q, most_k, dropout, causal, mask, rest) == (None, None, T, T, 0.0, True, False, {})
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    o, lse = attention_reference(q, k, v, None, None, scale, keys_seen(window_size_left, window_size_right), None)
    return o, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0, dtype=torch.uint64), q.new_empty(0)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cum_q: Any, cum_k: Any, most_q: int,
    most_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *, scale: float,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert (cum_q, cum_k, most_q, most_k, dropout, causal) == (None, None, T, T, 0.0, True)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert o.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    window = keys_seen(window_size_left, window_size_right)
    return attention_backward_reference(dout, q, k, v, o, lse, None, scale, window, None, True, True, True)


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors say that they are on a GPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
        yield


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("H", "KV"), [(4, 4), (6, 2)])
def test_the_arguments_and_results_are_those_of_the_reference(H: int, KV: int, window: int | None, sinks: bool) -> None:
    """Bit for bit, as the stand-ins compute with it: on slices of a fused projection, and on rows in no order."""
    qkv = torch.randn(B, T, H + 2 * KV, D).bfloat16()
    if sinks:  # which the strides have nothing to do with
        qkv = qkv.transpose(-1, -2).contiguous().transpose(-1, -2)
    q, k, v = qkv.split((H, KV, KV), 2)
    logits = torch.randn(H).bfloat16() if sinks else None
    o, lse = flash.attention(q, k, v, None, logits, 0.3, window, None)
    want_o, want_lse = attention_reference(q, k, v, None, logits, 0.3, window, None)
    assert o.is_contiguous() and lse.is_contiguous() and lse.shape == (B, H, T)
    # A sink takes its share of what was rounded before.
    torch.testing.assert_close(o, want_o, rtol=2**-7 if sinks else 0, atol=1e-3 if sinks else 0)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6 if sinks else 0, atol=1e-6 if sinks else 0)
    dout = torch.randn(B, T, H, D).bfloat16()
    told = (dout, q, k, v, o, lse, None, 0.3, window, None)
    for needed in ((True, True, True), (True, False, False), (False, True, True)):
        got = flash.attention_backward(*told, *needed)
        want = attention_backward_reference(*told, *needed)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.is_contiguous() and torch.equal(mine, theirs)
