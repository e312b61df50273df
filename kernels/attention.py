"""Triton kernels of `cogsym.ops.attention`, which holds the contract and the formulas.

Flash attention (Dao, arXiv 2307.08691) that reads where each query's keys begin: packed documents and padding need
neither a mask of T x T nor the lengths of sequences on the host. The rows of a tile are some positions of all query
heads that share a key-value head, so that a key is read once for all of them. Backward, one kernel goes along the keys
for dq and writes delta = Σ o · do, another along the queries for dk and dv. Nothing of T x T is ever in memory. A value
that is not finite makes NaN of the queries of its tile, as in other flash kernels.

Bound by matrix instructions. Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import inner_contiguous, on_device
from cogsym.kernels.linear_cross_entropy import _logit

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


# Of heads of up to so many features, in 16 bits and in more: (rows, keys, warps, stages) of the forward pass and of the
# backward pass. The largest whose registers hold all, as compiled for sm_80 to sm_100, and for gfx942.
_NVIDIA = {
    (64, 2): ((128, 64, 8, 2), (64, 32, 4, 1)),
    (128, 2): ((128, 32, 8, 1), (32, 64, 8, 1)),
    (256, 2): ((64, 32, 8, 1), (32, 32, 8, 1)),
    (64, 4): ((32, 32, 4, 1), (16, 32, 4, 1)),
}
_AMD = {
    (64, 2): ((64, 32, 4, 1), (64, 32, 8, 1)),
    (128, 2): ((64, 32, 8, 1), (32, 16, 4, 1)),
    (256, 2): ((32, 32, 8, 1), (16, 16, 4, 1)),
    (64, 4): ((32, 32, 4, 1), (16, 32, 4, 1)),
}


def config(G: int, D: int, itemsize: int, backward: bool) -> dict[str, int]:
    """Tiles and warps for G query heads a key-value head of D features."""
    block_d = max(16, triton.next_power_of_2(D))
    tiles = _AMD if torch.version.hip else _NVIDIA
    rows, keys, warps, stages = tiles[max(64, block_d), min(itemsize, 4)][backward]
    rows = max(rows, triton.next_power_of_2(G))
    return {
        "POSITIONS": rows // G,
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": stages,
    }


@triton.jit
def _places(tile, kv, T, G: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile's rows: position, head, and whether there is one."""
    row = tl.arange(0, BLOCK_M)
    t = tile * POSITIONS + row // G
    return t, kv * G + row % G, (row < POSITIONS * G) & (t < T)


@triton.jit
def _first_keys(starts_ptr, t, valid, WINDOW: tl.constexpr):
    """The first key that each row sees; `starts_ptr` is of this sequence, or None."""
    first = t * 0
    if starts_ptr is not None:
        first = tl.load(starts_ptr + t, valid, 0)
    if WINDOW > 0:
        first = tl.maximum(first, t - (WINDOW - 1))
    return first


@triton.jit
def _stretches(tile, t, first, valid, T, POSITIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Between what a tile's keys lie: from the first that a row sees; from where all rows see all; to where they no
    more do; and the end, which is the last row's own key. All but that are multiples of BLOCK_N."""
    begin = tl.min(tl.where(valid, first, T), 0) // BLOCK_N * BLOCK_N
    all_from = (tl.max(tl.where(valid, first, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    all_to = (tile * POSITIONS + 1) // BLOCK_N * BLOCK_N
    all_from = tl.minimum(all_from, tl.maximum(all_to, begin))
    return begin, all_from, tl.maximum(all_to, all_from), tl.minimum((tile + 1) * POSITIONS, T)


@triton.jit
def _columns(ptr, stride, s, d, T, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values, [BLOCK_N, BLOCK_D], 0 beyond the sequence and the head."""
    place = ptr + s[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(place, (s < T)[:, None] & (d < D)[None, :], 0.0)
    if D < BLOCK_D:
        return tl.load(place, (d < D)[None, :], 0.0)
    return tl.load(place)


@triton.jit
def _probabilities(
    q, k, t, first, s, lse, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr
):
    """e^(logit - lse), 0 where a key is not seen; and the logit's slope in the product of q and k."""
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=lse.dtype)
    x, slope = _logit(z, SCALE, SOFT_CAP)
    p = tl.exp2((x - lse[:, None]) * _LOG2E)
    if MASKED:
        p = tl.where((s[None, :] <= t[:, None]) & (s[None, :] >= first[:, None]), p, 0.0)
    return p, slope


@triton.jit
def _attend(
    sums, top, total, q, k_ptr, v_ptr, k_row, v_row, t, first, begin, end, T,
    D: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys [begin, end) into the sums; logits are in units of ln 2."""
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        k = _columns(k_ptr, k_row, s, d, T, D, BLOCK_D, MASKED)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=top.dtype)
        x, _ = _logit(z, SCALE, SOFT_CAP)
        x *= _LOG2E
        if MASKED:
            x = tl.where((s[None, :] <= t[:, None]) & (s[None, :] >= first[:, None]), x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        # No finite logit yet: any finite shift makes the exponentials 0.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(x - shift[:, None])
        shrink = tl.exp2(top - shift)
        v = _columns(v_ptr, v_row, s, d, T, D, BLOCK_D, MASKED)
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=top.dtype)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    return sums, top, total


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, T, heads, D]
    starts_ptr,  # [B, T], contiguous; or None: 0
    sinks_ptr,  # [H], contiguous; or None: none
    o_ptr,  # [B, T, H, D], contiguous
    lse_ptr,  # [B, H, T], contiguous, of the compute type
    T, KV,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """POSITIONS positions of one sequence and one key-value head a program; those with the most keys come first."""
    compute: tl.constexpr = lse_ptr.dtype.element_ty
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, kv = (tl.program_id(1) // KV).to(tl.int64), tl.program_id(1) % KV
    t, head, valid = _places(tile, kv, T, G, POSITIONS, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    there = valid[:, None] & (d < D)[None, :]
    if starts_ptr is not None:
        starts_ptr += b * T
    first = _first_keys(starts_ptr, t, valid, WINDOW)
    q = tl.load(q_ptr + b * q_batch + (t * q_row + head * q_head)[:, None] + d[None, :], there, 0.0)
    k_ptr += b * k_batch + kv * k_head
    v_ptr += b * v_batch + kv * v_head

    sums = tl.zeros((BLOCK_M, BLOCK_D), compute)
    total = tl.zeros((BLOCK_M,), compute)
    top = tl.full((BLOCK_M,), float("-inf"), compute)
    if sinks_ptr is not None:  # the first key that a row meets, and its value is 0
        top = tl.load(sinks_ptr + head, valid, 0.0).to(compute) * _LOG2E
        total += 1.0
    begin, all_from, all_to, end = _stretches(tile, t, first, valid, T, POSITIONS, BLOCK_N)
    sums, top, total = _attend(
        sums, top, total, q, k_ptr, v_ptr, k_row, v_row, t, first, begin, all_from, T,
        D, SCALE, SOFT_CAP, PRECISION, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    sums, top, total = _attend(
        sums, top, total, q, k_ptr, v_ptr, k_row, v_row, t, first, all_from, all_to, T,
        D, SCALE, SOFT_CAP, PRECISION, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    sums, top, total = _attend(
        sums, top, total, q, k_ptr, v_ptr, k_row, v_row, t, first, all_to, end, T,
        D, SCALE, SOFT_CAP, PRECISION, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip

    H = KV * G
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing has 0 and -inf
    o = sums / total[:, None]
    place = ((b * T + t) * H + head)[:, None] * D + d[None, :]
    tl.store(o_ptr + place, o.to(o_ptr.dtype.element_ty), there)
    tl.store(lse_ptr + (b * H + head) * T + t, (top + tl.log2(total)) * _LN2, valid)


@triton.jit
def _gather_dq(
    dq, q, do, k_ptr, v_ptr, k_row, v_row, t, first, lse, delta, begin, end, T,
    D: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq with what the keys [begin, end) add."""
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        k = _columns(k_ptr, k_row, s, d, T, D, BLOCK_D, MASKED)
        v = _columns(v_ptr, v_row, s, d, T, D, BLOCK_D, MASKED)
        p, slope = _probabilities(q, k, t, first, s, lse, SCALE, SOFT_CAP, PRECISION, MASKED)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=lse.dtype)
        dz = p * (dp - delta[:, None]) * slope
        if MASKED:
            dz = tl.where(p == 0.0, 0.0, dz)  # 0 · NaN
        dq += tl.dot(dz.to(k.dtype), k, input_precision=PRECISION, out_dtype=lse.dtype)
    return dq


@triton.jit
def query_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr,  # [B, T, heads, D]
    o_ptr,  # [B, T, H, D], contiguous
    lse_ptr,  # [B, H, T], contiguous, of the compute type
    delta_ptr,  # like lse_ptr; written
    starts_ptr,  # [B, T], contiguous; or None: 0
    dq_ptr,  # [B, T, H, D], contiguous; or None: not wanted
    T, KV,
    do_batch, do_row, do_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `attention_kernel`."""
    compute: tl.constexpr = lse_ptr.dtype.element_ty
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, kv = (tl.program_id(1) // KV).to(tl.int64), tl.program_id(1) % KV
    t, head, valid = _places(tile, kv, T, G, POSITIONS, BLOCK_M)
    d, H = tl.arange(0, BLOCK_D), KV * G
    there = valid[:, None] & (d < D)[None, :]
    place = ((b * T + t) * H + head)[:, None] * D + d[None, :]
    do = tl.load(do_ptr + b * do_batch + (t * do_row + head * do_head)[:, None] + d[None, :], there, 0.0)
    delta = tl.sum(do.to(compute) * tl.load(o_ptr + place, there, 0.0).to(compute), 1)
    of_row = (b * H + head) * T + t
    tl.store(delta_ptr + of_row, delta, valid)
    if dq_ptr is not None:
        if starts_ptr is not None:
            starts_ptr += b * T
        first = _first_keys(starts_ptr, t, valid, WINDOW)
        q = tl.load(q_ptr + b * q_batch + (t * q_row + head * q_head)[:, None] + d[None, :], there, 0.0)
        lse = tl.load(lse_ptr + of_row, valid, 0.0)
        k_ptr += b * k_batch + kv * k_head
        v_ptr += b * v_batch + kv * v_head
        begin, all_from, all_to, end = _stretches(tile, t, first, valid, T, POSITIONS, BLOCK_N)
        dq = tl.zeros((BLOCK_M, BLOCK_D), compute)
        dq = _gather_dq(
            dq, q, do, k_ptr, v_ptr, k_row, v_row, t, first, lse, delta, begin, all_from, T,
            D, SCALE, SOFT_CAP, PRECISION, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
        dq = _gather_dq(
            dq, q, do, k_ptr, v_ptr, k_row, v_row, t, first, lse, delta, all_from, all_to, T,
            D, SCALE, SOFT_CAP, PRECISION, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
        dq = _gather_dq(
            dq, q, do, k_ptr, v_ptr, k_row, v_row, t, first, lse, delta, all_to, end, T,
            D, SCALE, SOFT_CAP, PRECISION, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
        tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), there)


@triton.jit
def key_gradients_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr,  # [B, T, heads, D]
    lse_ptr, delta_ptr,  # [B, H, T], contiguous, of the compute type
    starts_ptr,  # [B, T], contiguous; or None: 0
    dk_ptr, dv_ptr,  # [B, T, KV, D], contiguous; or None: not wanted
    T, KV,
    do_batch, do_row, do_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    G: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one sequence and one key-value head a program; those that the most queries see come first."""
    compute: tl.constexpr = lse_ptr.dtype.element_ty
    block = tl.program_id(0) * BLOCK_N
    b, kv = (tl.program_id(1) // KV).to(tl.int64), tl.program_id(1) % KV
    s, d, H = block + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), KV * G
    k = _columns(k_ptr + b * k_batch + kv * k_head, k_row, s, d, T, D, BLOCK_D, True)
    v = _columns(v_ptr + b * v_batch + kv * v_head, v_row, s, d, T, D, BLOCK_D, True)
    if starts_ptr is not None:
        starts_ptr += b * T
    dk = tl.zeros((BLOCK_N, BLOCK_D), compute)
    dv = tl.zeros((BLOCK_N, BLOCK_D), compute)
    last = T if WINDOW == 0 else tl.minimum(T, block + BLOCK_N + WINDOW - 1)
    for tile in range(block // POSITIONS, (last + POSITIONS - 1) // POSITIONS):
        t, head, valid = _places(tile, kv, T, G, POSITIONS, BLOCK_M)
        first = _first_keys(starts_ptr, t, valid, WINDOW)
        # Documents behind the keys' own see none of them.
        if tl.min(tl.where(valid, first, T), 0) < block + BLOCK_N:
            there = valid[:, None] & (d < D)[None, :]
            q = tl.load(q_ptr + b * q_batch + (t * q_row + head * q_head)[:, None] + d[None, :], there, 0.0)
            do = tl.load(do_ptr + b * do_batch + (t * do_row + head * do_head)[:, None] + d[None, :], there, 0.0)
            of_row = (b * H + head) * T + t
            lse = tl.load(lse_ptr + of_row, valid, float("inf"))  # a row that is not there has probability 0
            delta = tl.load(delta_ptr + of_row, valid, 0.0)
            p, slope = _probabilities(q, k, t, first, s, lse, SCALE, SOFT_CAP, PRECISION, True)
            dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION, out_dtype=compute)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=compute)
            dz = tl.where(p == 0.0, 0.0, p * (dp - delta[:, None]) * slope)
            dk += tl.dot(tl.trans(dz.to(q.dtype)), q, input_precision=PRECISION, out_dtype=compute)
    place = ((b * T + s) * KV + kv)[:, None] * D + d[None, :]
    there = (s < T)[:, None] & (d < D)[None, :]
    if dk_ptr is not None:
        tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), there)
    if dv_ptr is not None:
        tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), there)


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
    """`cogsym.ops.attention.attention_reference` by one kernel."""
    B, T, H, _ = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    if not q.numel():
        return o, lse
    q, k, v = (inner_contiguous(x) for x in (q, k, v))
    starts, sinks = (None if x is None else x.contiguous() for x in (starts, sinks))
    shape = _shape(q, k, scale, window, soft_cap, backward=False)
    with on_device(q):
        attention_kernel[(triton.cdiv(T, shape["POSITIONS"]), B * k.shape[2])](
            q, k, v, starts, sinks, o, lse, T, k.shape[2], *_strides(q, k, v), **shape
        )  # fmt: skip
    return o, lse


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
    """`cogsym.ops.attention.attention_backward_reference` by two kernels."""
    B, T, KV = k.shape[:3]
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in ((q, need_dq), (k, need_dk), (v, need_dv))
    )
    if not q.numel():
        return dq, dk, dv
    dout, q, k, v = (inner_contiguous(x) for x in (dout, q, k, v))
    o, lse, delta = o.contiguous(), lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    starts = None if starts is None else starts.contiguous()
    shape, strides = _shape(q, k, scale, window, soft_cap, backward=True), _strides(dout, q, k, v)
    with on_device(q):
        query_gradient_kernel[(triton.cdiv(T, shape["POSITIONS"]), B * KV)](
            dout, q, k, v, o, lse, delta, starts, dq if need_dq else None, T, KV, *strides, **shape
        )  # fmt: skip
        if need_dk or need_dv:
            key_gradients_kernel[(triton.cdiv(T, shape["BLOCK_N"]), B * KV)](
                dout, q, k, v, lse, delta, starts, dk if need_dk else None, dv if need_dv else None,
                T, KV, *strides, **shape,
            )  # fmt: skip
    return dq, dk, dv


def _shape(
    q: Tensor, k: Tensor, scale: float, window: int | None, soft_cap: float | None, backward: bool
) -> dict[str, Any]:
    """What kernels are compiled for."""
    G, D = q.shape[2] // k.shape[2], q.shape[3]
    return {
        "G": G,
        "D": D,
        "SCALE": scale,
        "SOFT_CAP": soft_cap or 0.0,
        "WINDOW": window or 0,
        # Three products of tf32 are as exact as float32, on tensor cores; AMD's have no such.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 and not torch.version.hip else "ieee",
        **config(G, D, q.element_size(), backward),
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]
