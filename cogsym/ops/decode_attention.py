"""Attention of single query rows, each over its own ranges of a flat store of keys and values.

    x_ns = scale · q_n · k_s                        for the keys s that row n sees
    x_ns = soft_cap · tanh(x_ns / soft_cap)         where there is a soft cap
    o_n = Σ_s e^(x_ns) · v_s / (Σ_s e^(x_ns) + e^sink)      e^sink where there are sinks

Row n sees key s where begins[n, m] <= s < ends[n, m] for one of its M ranges. So the keys of many sequences lie in one
store and rows of different lengths go in one call: a prompt is stored once and seen by every row that continues it, a
row's own continuation is a second range, a header that prompts share a third. Positions, windows and what is causal are
in the ranges: the caller makes them. Query head h reads key-value head h // (H / KV).

Keys are read once for neighbouring rows whose ranges are alike, so rows that share a prompt belong side by side. Long
ranges are cut in chunks that several threads compute (Dao et al., "Flash-Decoding", 2023). Sums are float32 (float64
for float64); half precision rounds e^(x) to its own before it multiplies by it, the reference does not. What lies
outside a row's ranges never reaches it, NaN included.

There are no gradients: scoring and generating need none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, cpp
from cogsym.ops.attention_inputs import AttentionOptions, check_heads
from cogsym.ops.operation import Example, Operation, Sizes, register_operation


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, options: AttentionOptions
) -> Tensor:
    """Attention of N rows to their ranges of S keys.

    Args:
        q: [N, H, D], floating point, neighbours in D neighbours in memory, any other strides.
        k: [S, KV, D], H a multiple of KV, dtype of q, strides as free; views of one larger buffer will do.
        v: like `k`.
        begins: int64 [N, M], the first key of each range of each row.
        ends: int64 [N, M], the key behind the last; a range with begins >= ends is empty. The ranges of one row do not
            overlap.
        options: scale, soft cap and sinks; no starts and no window, which are in the ranges.

    Returns:
        [N, H, D], contiguous, dtype of q; 0 in a row that sees no key.

    Raises:
        ValueError: shapes or strides that do not fit, options with starts or a window, or, on CPU, a range that leaves
            the store (on a GPU, to look would wait for it).
        TypeError: dtypes that differ or are not floating point, or ranges that are not int64.
        RuntimeError: a gradient would be wanted, or tensors are on different devices.
    """
    sinks = options.sinks
    if options.starts is not None or options.window is not None:
        given = "starts" if options.starts is not None else "a window"
        raise ValueError(f"decode_attention: options has {given}, expected none; ranges say which keys a row sees.")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        raise RuntimeError(
            "decode_attention has no gradient but q, k, v or sinks requires one; call it under torch.no_grad() or "
            "detach them."
        )
    return _decode_attention(q, k, v, begins, ends, sinks, options.scale, options.soft_cap)


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    sinks: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """`decode_attention` in plain PyTorch, row by row; the documentation of the kernels."""
    _check_ranges(begins, ends, len(k))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, kv = torch.zeros_like(q, memory_format=torch.contiguous_format), k.shape[1]
    for n, ranges in enumerate(torch.stack((begins, ends), -1).tolist()):
        seen = [slice(begin, end) for begin, end in ranges if begin < end]
        if not seen:
            continue
        keys, values = (torch.cat([x[s] for s in seen]).to(compute).transpose(0, 1) for x in (k, v))
        logits = scale * q[n].to(compute).unflatten(0, (kv, -1)) @ keys.mT  # [KV, H / KV, keys]
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if sinks is not None:
            logits = torch.cat((logits, sinks.to(compute).view(kv, -1, 1)), -1)
        o[n] = (logits.softmax(-1)[..., : keys.shape[1]] @ values).flatten(0, 1).to(q.dtype)
    return o


def _check(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, sinks: Tensor | None, *rest: Any) -> None:
    """All that is known without looking at values."""
    shape, of_keys = q.shape, k.shape
    if len(shape) != 3:
        raise ValueError(f"decode_attention: q has shape {tuple(shape)}, expected [N, H, D].")
    N, H, D = shape
    if of_keys != v.shape or len(of_keys) != 3 or of_keys[2] != D:
        raise ValueError(
            f"decode_attention: k has shape {tuple(of_keys)} and v {tuple(v.shape)}, expected both [S, KV, {D}] to "
            "match q."
        )
    check_heads("decode_attention", H, of_keys[1], q, k, v, sinks)
    of_ranges = begins.shape
    if of_ranges != ends.shape or len(of_ranges) != 2 or of_ranges[0] != N:
        raise ValueError(
            f"decode_attention: begins has shape {tuple(of_ranges)} and ends {tuple(ends.shape)}, expected both "
            f"[{N}, M] to match q."
        )
    if begins.dtype != torch.int64 or ends.dtype != torch.int64:
        raise TypeError(f"decode_attention: begins is {begins.dtype} and ends {ends.dtype}, expected torch.int64.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if D > 1 and x.stride(-1) != 1:
            raise ValueError(f"decode_attention: {name}'s last dimension has stride {x.stride(-1)}, expected 1.")


def _check_ranges(begins: Tensor, ends: Tensor, S: int) -> None:
    """Values are looked at within the operation: before it, torch.compile would have to break its graph for them."""
    if begins.numel() == 0 or not begins.device.type == ends.device.type == "cpu":
        return
    first, last = int(begins.min()), int(ends.max())
    if first < 0 or last > S:
        wrong = f"begins at {first}" if first < 0 else f"ends at {last}"
        raise ValueError(f"decode_attention: a range {wrong}, expected one within the store's {S} keys.")


def _cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    sinks: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """By csrc/decode_attention.cpp."""
    o = cpp.empty_like(q)
    if not q.numel():
        _check_ranges(begins, ends, len(k))
    else:
        q, k, v = cpp.contiguous_rows(q), cpp.contiguous_rows(k), cpp.contiguous_rows(v)
        begins, ends = begins.contiguous(), ends.contiguous()
        sinks = None if sinks is None else sinks.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
        N, H, D = q.shape
        inside = cpp.extension.decode_attention(
            q.data_ptr(), q.stride()[:2], k.data_ptr(), k.stride()[:2], v.data_ptr(), v.stride()[:2],
            begins.data_ptr(), ends.data_ptr(), cpp.address(sinks), N, begins.shape[1], len(k), H, k.shape[1], D,
            scale, soft_cap or 0.0, cpp.DTYPES[q.dtype], torch.get_num_threads(), o.data_ptr(),
        )  # fmt: skip
        if not inside:
            _check_ranges(begins, ends, len(k))
    return o


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Sixteen rows that share a prompt, each with 64 tokens of its own behind it."""
    N, H, KV, D, own, prompt = 16, sizes.heads, sizes.kv_heads, sizes.head_dim, 64, sizes.rows * sizes.length
    q = torch.randn(N, H, D, device=device).to(dtype)
    k, v = (torch.randn(prompt + N * own, KV, D, device=device).to(dtype) for _ in range(2))
    firsts = prompt + own * torch.arange(N, device=device)
    begins = torch.stack((torch.zeros_like(firsts), firsts), 1)
    ends = torch.stack((torch.full_like(firsts, prompt), firsts + own), 1)
    place = torch.arange(len(k), device=device)
    visible = ((place >= begins[..., None]) & (place < ends[..., None])).any(1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (decode_attention(q, k, v, begins, ends, AttentionOptions(D**-0.5)),)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)[0].transpose(0, 1),)

    size = (2 * k.numel() + 2 * q.numel()) * q.element_size()
    return Example({"q": q, "k": k, "v": v}, ours, plain, (), "B", {"forward": size})


# No FLOP formula: it would see shapes alone, and how many keys a row sees is in the values of its ranges.
_decode_attention = register_operation(
    Operation(
        "decode_attention",
        decode_attention_reference,
        check=_check,
        backends=(backend.cpp(_cpp), backend.triton("cogsym.kernels.decode_attention:decode_attention")),
        fake=lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
        example=_example,
    )
)
