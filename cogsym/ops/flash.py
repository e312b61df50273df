"""PyTorch's flash attention, forward and backward apart, under the names and with the arguments of the references.

It serves CUDA tensors in half precision (FlashAttention-2, arXiv 2307.08691), and CPU tensors where the C++ extension
is not built. The CUDA half calls what scaled_dot_product_attention calls for whole rows; no GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from cogsym.ops.backend import Backend, Facts
from cogsym.ops.cpp import contiguous_rows

# How sequences lie in a batch: one a row, or as `starts` says.
Sequences = Literal["whole", "by starts"]

aten = torch.ops.aten


def backend(function: Callable[..., Any]) -> Backend:
    """These kernels, as a backend of attention."""
    return Backend("flash", function, ("cuda", "cpu"), refuses=refuses)


def refuses(
    device: str,
    dtype: torch.dtype,
    head_dim: int = 128,
    window: int | None = None,
    soft_cap: float | None = None,
    sequences: Sequences = "whole",
    empty: bool = False,
) -> str | None:
    """Why these kernels do not compute such attention, or None."""
    if soft_cap is not None:
        return "PyTorch's flash attention has no soft cap"
    if empty:
        return "PyTorch's flash attention takes no empty tensors"
    if device == "cpu":
        restricted = sequences != "whole" or window is not None
        return "PyTorch's flash attention on a CPU is causal and nothing else" if restricted else None
    if sequences != "whole":
        return "PyTorch's flash attention would have to be told lengths, for which the CPU waits"
    if dtype not in (torch.bfloat16, torch.float16):
        return "PyTorch's flash attention takes bfloat16 and float16"
    if head_dim % 8 or head_dim > 256:
        return f"PyTorch's flash attention takes heads of a multiple of 8 up to 256, not {head_dim}"
    return None


def facts(q: Tensor, starts: Tensor | None, window: int | None, soft_cap: float | None) -> Facts:
    """Of arguments, what `refuses` looks at."""
    return {
        "head_dim": q.shape[-1],
        "window": window,
        "soft_cap": soft_cap,
        "sequences": "whole" if starts is None else "by starts",
        "empty": not q.numel(),
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `cogsym.ops.attention.attention_reference`."""
    if not q.is_cuda:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, True, scale=scale)
        return _with_sinks(o.transpose(1, 2).contiguous(), lse.contiguous(), sinks)
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    o, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], q.shape[1], 0.0, True, False, scale=scale, **_window(window)
    )
    return _with_sinks(o.contiguous(), lse, sinks)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cogsym.ops.attention.attention_backward_reference`, but that all gradients are computed."""
    if not q.is_cuda:
        grad, out, *inputs = _heads_first(dout, o, q, k, v)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *inputs, out, lse, 0.0, True, scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
    else:
        q, k, v, T = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), q.shape[1]
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is not
        dq, dk, dv = aten._flash_attention_backward(
            dout, q, k, v, o, lse, None, None, T, T, 0.0, True, unused, unused, scale=scale, **_window(window)
        )
    return (
        dq.contiguous() if need_dq else q.new_empty(0),
        dk.contiguous() if need_dk else k.new_empty(0),
        dv.contiguous() if need_dv else v.new_empty(0),
    )


def _with_sinks(o: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """A sink's value is 0: it takes its share of every other."""
    if sinks is None:
        return o, lse
    with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (o * torch.exp(lse - with_sinks).mT[..., None]).to(o.dtype), with_sinks


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _window(window: int | None) -> dict[str, int | None]:
    """How many keys before and behind its own a query sees."""
    return {"window_size_left": None if window is None else window - 1, "window_size_right": 0}
