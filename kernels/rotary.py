"""Triton kernel of `cogsym.ops.rotary`, which holds the contract and the formula.

Bound by memory: for x of N elements of s bytes it reads x and writes y, 2s·N bytes; cos and sin are read once for every
`BLOCK_H` heads, from cache after the first. Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on
a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import inner_contiguous, on_device


def config(D: int, half: int) -> dict[str, int]:
    """Tile and warps for heads of D features, 2·half of them turned: 16 elements a thread and head."""
    pairs, rest = triton.next_power_of_2(half), triton.next_power_of_2(max(1, D - 2 * half))
    widest = max(2 * pairs, rest)
    tokens = max(1, min(64, 2048 // widest))
    return {
        "BLOCK_T": tokens,
        "BLOCK_HALF": pairs,
        "BLOCK_REST": rest,
        "BLOCK_H": 8,
        "num_warps": max(1, min(8, tokens * widest // 512)),
    }


@triton.jit
def rotary_kernel(
    x_ptr,  # [B, T, H, D]
    cos_ptr,  # [B or 1, T, HALF]
    sin_ptr,  # [B or 1, T, HALF]
    y_ptr,  # [B, T, H, D], contiguous
    tokens,  # B·T
    T,
    H,
    x_batch,
    x_token,
    x_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_T tokens and BLOCK_H heads a program; cos and sin stay in registers while it goes from head to head."""
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    token_mask = token < tokens
    batch, position = token // T, token % T

    pair = tl.arange(0, BLOCK_HALF)[None, :]
    pair_mask = token_mask & (pair < HALF)
    cos = tl.load(cos_ptr + batch * cos_batch + position * cos_token + pair, pair_mask, 0.0).to(compute)
    sin = tl.load(sin_ptr + batch * sin_batch + position * sin_token + pair, pair_mask, 0.0).to(compute)
    if INVERSE:
        sin = -sin

    first_head = tl.program_id(1).to(tl.int64) * BLOCK_H
    for head in range(first_head, tl.minimum(first_head + BLOCK_H, H)):
        x = x_ptr + batch * x_batch + position * x_token + head * x_head
        y = y_ptr + (token * H + head) * D
        if INTERLEAVED:
            # Neighbours are loaded as they lie and parted in registers: full-width loads.
            col = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            mask = token_mask & (col < 2 * HALF)
            both = tl.load(x + col, mask, 0.0, eviction_policy="evict_first").to(compute)
            a, b = tl.split(tl.reshape(both, (BLOCK_T, BLOCK_HALF, 2)))
            both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_T, 2 * BLOCK_HALF))
            tl.store(y + col, both.to(dtype), mask)
        else:
            a = tl.load(x + pair, pair_mask, 0.0, eviction_policy="evict_first").to(compute)
            b = tl.load(x + HALF + pair, pair_mask, 0.0, eviction_policy="evict_first").to(compute)
            tl.store(y + pair, (a * cos - b * sin).to(dtype), pair_mask)
            tl.store(y + HALF + pair, (b * cos + a * sin).to(dtype), pair_mask)
        if 2 * HALF < D:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
            mask = token_mask & (rest < D)
            tl.store(y + rest, tl.load(x + rest, mask, eviction_policy="evict_first"), mask)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """`cogsym.ops.rotary.rotary_reference` by one kernel."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    B, T, H, D = x.shape
    half = cos.shape[-1]
    if half == 0 or x.numel() == 0:
        return y.copy_(x)
    x, cos, sin = inner_contiguous(x), inner_contiguous(cos), inner_contiguous(sin)
    cos_batch, sin_batch = (t.stride(0) if t.shape[0] > 1 else 0 for t in (cos, sin))
    tile = config(D, half)
    with on_device(x):
        rotary_kernel[(triton.cdiv(B * T, tile["BLOCK_T"]), triton.cdiv(H, tile["BLOCK_H"]))](
            x,
            cos,
            sin,
            y,
            B * T,
            T,
            H,
            *x.stride()[:3],
            cos_batch,
            cos.stride(1),
            sin_batch,
            sin.stride(1),
            D=D,
            HALF=half,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            **tile,
        )
    return y
