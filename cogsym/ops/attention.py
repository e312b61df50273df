"""Causal attention with grouped heads, packed sequences, a sliding window, a soft cap and sinks.

    x_ts = scale · q_t · k_s                        for the keys s that query t sees
    x_ts = soft_cap · tanh(x_ts / soft_cap)         where there is a soft cap
    lse_t = ln (Σ_s e^(x_ts) + e^sink)              e^sink where there are sinks
    o_t = Σ_s e^(x_ts - lse_t) · v_s

Query t sees the keys start_t <= s <= t, and with a window only those with s > t - window. Query head h reads key-value
head h // (H / KV). A sink is a logit that each query head has learned, of a key whose value is 0. Sources: Vaswani et
al., arXiv 1706.03762; grouped heads, Ainslie et al., arXiv 2305.13245; the soft cap, Gemma 2, arXiv 2408.00118; sinks,
gpt-oss, arXiv 2508.10925.

With p_ts = e^(x_ts - lse_t) and delta_t = do_t · o_t, the gradients are

    dv_s = Σ_t p_ts · do_t
    dx_ts = p_ts · (do_t · v_s - delta_t)           times 1 - (x_ts / soft_cap)² where there is a soft cap
    dq_t = scale · Σ_s dx_ts · k_s                  dk_s = scale · Σ_t dx_ts · q_t
    dsink = -Σ_t e^(sink - lse_t) · delta_t

(Dao, FlashAttention-2, arXiv 2307.08691.) Kept for them are q, k, v, o and lse, in which the sinks are: only their own
gradient has to know them. A block that keeps o and lse and computes q, k and v again calls `attention_gradients`.

Sums are float32 (float64 for float64). Half precision rounds p and dx to its own before it multiplies by them, as flash
kernels do; the reference does not. A key that is not finite reaches only the queries that see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, cpp, flash
from cogsym.ops.attention_inputs import AttentionOptions, check, check_backward, check_starts
from cogsym.ops.operation import Example, Operation, Sizes, register_operation


def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Causal attention; the gradient flows through o.

    Args:
        q: [B, T, H, D], floating point, any strides; a slice of a fused projection will do.
        k: [B, T, KV, D], H a multiple of KV, dtype of q.
        v: like `k`.
        options: scale, which keys are seen, soft cap and sinks.

    Returns:
        o, [B, T, H, D] contiguous, dtype of q; and lse, [B, H, T], natural logarithm, float32 (float64 for float64),
        through which no gradient flows.

    Raises:
        ValueError: shapes that do not fit, or a query that sees keys from one behind it on.
        TypeError: dtypes that differ or are not floating point.
        RuntimeError: tensors on different devices.
    """
    return _attention(q, k, v, options.starts, options.sinks, options.scale, options.window, options.soft_cap)


def attention_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of an `attention` whose gradient is not left to autograd; the sinks get none.

    Args:
        dout: [B, T, H, D], gradient of o.
        q: as in the forward pass; like k and v it may be computed again from what it was made of.
        k: likewise.
        v: likewise.
        o: result of the forward pass.
        lse: result of the forward pass.
        options: as in the forward pass.

    Returns:
        (dq, dk, dv), contiguous.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention`; dout and o are like q.
    """
    return _attention_backward(
        dout, q, k, v, o, lse, options.starts, options.scale, options.window, options.soft_cap, True, True, True
    )


def attention_pairs(length: int, window: int | None = None) -> int:
    """How many keys the queries of one sequence see in all: Σ_t min(t + 1, window)."""
    seen = min(length, window or length)
    return length * seen - seen * (seen - 1) // 2


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """`attention` in plain PyTorch, with all logits and an explicit mask; the documentation of the kernels."""
    check_starts(starts)
    logits, visible = _logits(q, k, starts, scale, window, soft_cap)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(k.shape[2], -1, 1))
    values = _grouped(v, k.shape[2])
    p = _probabilities(logits, lse, visible)
    o = p @ _finite(values)
    if not values.isfinite().all():  # 0 · NaN, but of a key that is not seen
        spoilt = torch.where(visible.unsqueeze(-1), p.unsqueeze(-1) * (values - _finite(values)).unsqueeze(-3), 0)
        o = o + spoilt.sum(-2)
    return o.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous(), lse.flatten(1, 2).contiguous()


def attention_backward_reference(
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
    """`attention_gradients` in plain PyTorch, an empty tensor for one that is not needed."""
    check_starts(starts)
    kv = k.shape[2]
    logits, visible = _logits(q, k, starts, scale, window, soft_cap)
    do, queries = (_grouped(x, kv) for x in (dout, q))
    keys, values = (_grouped(x, kv) for x in (k, v))  # [B, KV, 1, T, D]
    p = _probabilities(logits, lse.unflatten(1, (kv, -1)), visible)
    dp = (do @ values.mT).masked_fill(~visible, 0)
    delta = (p * dp).sum(-1, keepdim=True)  # do · o, which is rounded: what cancels here comes from the same numbers
    p = p.masked_fill(visible & ~do.isfinite().all(-1, keepdim=True), torch.nan)
    dx = p * (dp - delta)
    if soft_cap is not None:
        dx = dx * (1 - (logits / soft_cap).square())
    dx = dx.masked_fill(~visible, 0)  # 0 · NaN
    dq = (scale * dx @ _finite(keys)).flatten(1, 2).transpose(1, 2) if need_dq else q.new_empty(0)
    dk = (scale * dx.mT @ _finite(queries)).sum(2).transpose(1, 2) if need_dk else k.new_empty(0)
    dv = (p.mT @ _finite(do)).sum(2).transpose(1, 2) if need_dv else v.new_empty(0)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _grouped(x: Tensor, kv: int) -> Tensor:
    """[B, T, heads, D] as [B, KV, heads / KV, T, D] in the dtype of the computation."""
    return (x if x.dtype == torch.float64 else x.float()).transpose(1, 2).unflatten(1, (kv, x.shape[2] // kv))


def _probabilities(logits: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
    """e^(x - lse), as the keys' softmax times what sinks leave to them: lse is rounded, and the sum would not be 1."""
    left = (logits.logsumexp(-1) - lse.to(logits.dtype)).exp().unsqueeze(-1)
    return (logits.softmax(-1) * left).masked_fill(~visible, 0)


def _finite(x: Tensor) -> Tensor:
    """`x` with 0 for what is not finite: it meets the zeros of keys that a query does not see, and 0 · NaN is NaN.

    Queries that do see such a key have a NaN on the other side of the product.
    """
    return x.masked_fill(~x.isfinite(), 0)


def _logits(
    q: Tensor, k: Tensor, starts: Tensor | None, scale: float, window: int | None, soft_cap: float | None
) -> tuple[Tensor, Tensor]:
    """Logits, [B, KV, G, T, T], -inf where a query does not see a key; and where it does, [B or 1, 1, 1, T, T]."""
    kv, position = k.shape[2], torch.arange(q.shape[1], device=q.device)
    t, s = position.unsqueeze(1), position
    visible = (s <= t)[None]
    if starts is not None:
        visible = visible & (s >= starts.unsqueeze(-1))
    if window is not None:
        visible = visible & (s > t - window)
    visible = visible[:, None, None]
    logits = scale * _grouped(q, kv) @ _grouped(k, kv).mT
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return logits.masked_fill(~visible, -torch.inf), visible


def _cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """By csrc/attention.cpp."""
    o, lse = _fake(q)
    if q.numel():
        q, k, v = cpp.contiguous_rows(q), cpp.contiguous_rows(k), cpp.contiguous_rows(v)
        starts = None if starts is None else starts.contiguous()
        sinks = None if sinks is None else sinks.to(lse.dtype).contiguous()
        computed = cpp.extension.attention(
            *_cpp_inputs(q, k, v, starts, scale, window, soft_cap), o.data_ptr(), lse.data_ptr(), cpp.address(sinks)
        )
        if not computed:
            check_starts(starts)
    return o, lse


def _cpp_backward(
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
    """By csrc/attention_backward.cpp."""
    dq, dk, dv = _fake_backward(dout, q, k, v, need_dq, need_dk, need_dv)
    if q.numel() and (need_dq or need_dk or need_dv):
        q, k, v, dout = (cpp.contiguous_rows(x) for x in (q, k, v, dout))
        starts = None if starts is None else starts.contiguous()
        o, lse = o.contiguous(), lse.contiguous()
        computed = cpp.extension.attention_backward(
            *_cpp_inputs(q, k, v, starts, scale, window, soft_cap),
            o.data_ptr(), lse.data_ptr(), dout.data_ptr(), dout.stride()[:3],
            dq.data_ptr() if need_dq else 0, dk.data_ptr() if need_dk else 0, dv.data_ptr() if need_dv else 0,
        )  # fmt: skip
        if not computed:
            check_starts(starts)
    return dq, dk, dv


def _cpp_inputs(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float, window: int | None, soft_cap: float | None
) -> tuple[
    int, tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...], int, int, int, int, int, int,
    float, int, float, int, int,
]:  # fmt: skip
    """The arguments that both directions begin with."""
    B, T, H, D = q.shape
    return (
        q.data_ptr(), q.stride()[:3], k.data_ptr(), k.stride()[:3], v.data_ptr(), v.stride()[:3],
        cpp.address(starts), B, T, H, k.shape[2], D, scale, window or 0, soft_cap or 0.0,
        cpp.DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _triton_refuses(
    device: str,
    dtype: torch.dtype,
    head_dim: int = 64,
    window: int | None = None,
    soft_cap: float | None = None,
    sequences: flash.Sequences = "whole",
    empty: bool = False,
) -> str | None:
    most = 256 if dtype.itemsize == 2 else 64
    if head_dim <= most:
        return None
    return f"heads of more than {most} features of {str(dtype).removeprefix('torch.')} do not fit a GPU's registers"


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((q, k, v), rest[-3:], strict=True)
    )
    return dq, dk, dv


# Two products of D multiplications for each pair of a query and a key that it sees, and five in the backward pass.
# Where a sequence begins is in the values of `starts`, so packed sequences count as whole rows.
def _flops(
    q: tuple[int, ...], k: Any, v: Any, starts: Any, sinks: Any, scale: float, window: int | None, *_: Any, **__: Any
) -> int:
    B, T, H, D = q
    return 4 * B * H * D * attention_pairs(T, window)


def _backward_flops(dout: Any, *rest: Any, **__: Any) -> int:
    B, T, H, D = dout
    return 10 * B * H * D * attention_pairs(T, rest[7])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, sinks, ctx.scale, ctx.window, ctx.soft_cap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, starts, sinks)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    o, lse = tensors[3:5]
    needed = ctx.needs_input_grad[:3]
    grads: tuple[Tensor, ...] = (o,) * 3
    if any(needed):
        grads = _attention_backward(dout, *tensors, ctx.scale, ctx.window, ctx.soft_cap, *needed)
    dsinks = None
    if ctx.needs_input_grad[4]:
        delta = (dout * o.to(lse.dtype)).sum(-1).mT
        dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)
    given = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *given, None, dsinks, None, None, None


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Causal, with grouped heads, on slices of a fused projection."""
    H, KV, D, T = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.length
    q, k, v = torch.randn(sizes.rows, T, H + 2 * KV, D, device=device).to(dtype).split((H, KV, KV), 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (attention(q, k, v, AttentionOptions(D**-0.5))[0],)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)

    product = 2 * sizes.rows * H * D * attention_pairs(T)
    inputs = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    return Example(inputs, ours, plain, ("q", "k", "v"), "FLOP", {"forward": 2 * product, "backward": 5 * product})


_attention = register_operation(
    Operation(
        "attention",
        attention_reference,
        check=check,
        backends=(
            backend.cpp(_cpp),
            flash.backend(flash.attention),
            backend.triton("cogsym.kernels.attention:attention", _triton_refuses),
        ),
        facts=lambda q, k, v, starts, sinks, scale, *rest: flash.facts(q, starts, *rest),
        fake=_fake,
        autograd=(_setup, _backward),
        flops=_flops,
        example=_example,
    )
)
_attention_backward = register_operation(
    Operation(
        "attention_backward",
        attention_backward_reference,
        check=check_backward,
        backends=(
            backend.cpp(_cpp_backward),
            flash.backend(flash.attention_backward),
            backend.triton("cogsym.kernels.attention:attention_backward", _triton_refuses),
        ),
        facts=lambda dout, q, k, v, o, lse, starts, scale, window, soft_cap, *_: flash.facts(
            q, starts, window, soft_cap
        ),
        fake=_fake_backward,
        flops=_backward_flops,
        part_of="attention",
    )
)
