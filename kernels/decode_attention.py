"""Triton kernels of `cogsym.ops.decode_attention`, which holds the contract and the formula.

Bound by memory: a program reads every key and value that its rows see, once for rows of it that share a range. Where
rows are few, the keys of a range are dealt to several programs (`splits`), and a second kernel adds up what they found:
8·splits·N·H·(D + 2) bytes more. Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import inner_contiguous, multiprocessors, on_device
from cogsym.kernels.linear_cross_entropy import _logit

PROGRAMS_PER_MULTIPROCESSOR = 4
# Key blocks that a split has at least, and splits of a row at most, whose results a second kernel adds up.
LEAST_BLOCKS, MOST_SPLITS = 4, 64


def config(G: int, D: int, itemsize: int) -> dict[str, int]:
    """Tile and warps for G query heads of D features a key-value head: a matrix instruction takes 16 queries."""
    block_d = max(16, triton.next_power_of_2(D))
    queries = max(16, triton.next_power_of_2(G))
    return {
        "ROWS": queries // G,
        "BLOCK_Q": queries,
        # More of both, and the registers of one target or another overflow: masks and addresses are wide.
        "BLOCK_K": max(16, min(64 // itemsize, 8192 // (block_d * itemsize))),
        "BLOCK_D": block_d,
        "num_warps": 8,
        "num_stages": 2 if block_d * itemsize <= 256 else 1,
    }


@triton.jit
def decode_attention_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [S, KV, D]
    v_ptr,  # [S, KV, D]
    begins_ptr,  # [N, M], contiguous
    ends_ptr,  # [N, M], contiguous
    sinks_ptr,  # [H], contiguous, or None: none
    o_ptr,  # [N, H, D], contiguous; or sums, [splits, N, H, D] of the compute type
    top_ptr,  # [splits, N, H] of the compute type, the largest logit; or None where there is one split
    total_ptr,  # like top_ptr: Σ e^(logit - top)
    N,
    M,
    q_row: tl.constexpr,
    q_head: tl.constexpr,
    k_row: tl.constexpr,
    k_head: tl.constexpr,
    v_row: tl.constexpr,
    v_head: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS rows and one key-value head a program; split s takes the key blocks s, s + SPLITS, ..."""
    compute: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * ROWS
    kv, split = tl.program_id(1), tl.program_id(2)
    query = tl.arange(0, BLOCK_Q)
    own, head = query // G, kv * G + query % G
    row = first + own
    valid = (own < ROWS) & (row < N)
    key, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (row * q_row + head * q_head)[:, None] + d[None, :], mask, 0.0)

    sums = tl.zeros((BLOCK_Q, BLOCK_D), compute)
    top = tl.full((BLOCK_Q,), float("-inf"), compute)
    total = tl.zeros((BLOCK_Q,), compute)
    if sinks_ptr is not None:
        # A sink is the first key that a row meets, in the first split, and its value is 0.
        top = tl.where(split == 0, tl.load(sinks_ptr + head, valid, 0.0).to(compute), top)
        total = tl.where(split == 0, total + 1.0, total)
    for m in range(M):
        begins = tl.load(begins_ptr + row * M + m, valid, 0)
        ends = tl.load(ends_ptr + row * M + m, valid, 0)
        for r in range(ROWS):
            here = first + r < N
            begin = tl.load(begins_ptr + (first + r) * M + m, here, 0)
            end = tl.load(ends_ptr + (first + r) * M + m, here, 0)
            members = (begins == begin) & (ends == end)
            # The first row of those with this range takes them all along.
            taken = tl.min(tl.where(members, own, ROWS), 0) == r
            length = tl.where(taken, end - begin, 0).to(tl.int32)
            for start in range(split * BLOCK_K, length, SPLITS * BLOCK_K):
                known = key < length - start
                place = k_ptr + (begin + start) * k_row + kv * k_head + (key * k_row)[None, :] + d[:, None]
                k = tl.load(place, known[None, :] & (d < D)[:, None] if D < BLOCK_D else known[None, :], 0.0)
                x, _ = _logit(tl.dot(q, k, input_precision="ieee", out_dtype=compute), SCALE, SOFT_CAP)
                x = tl.where(members[:, None] & known[None, :], x, float("-inf"))
                new_top = tl.maximum(top, tl.max(x, 1))
                # No finite logit yet: any finite shift makes the exponentials 0.
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp(x - shift[:, None])
                shrink = tl.exp(top - shift)
                place = v_ptr + (begin + start) * v_row + kv * v_head + (key * v_row)[:, None] + d[None, :]
                v = tl.load(place, known[:, None] & (d < D)[None, :] if D < BLOCK_D else known[:, None], 0.0)
                product = tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=compute)
                # Rows that do not see these values have zeros for p, but 0 · NaN is NaN.
                sums = tl.where(members[:, None], sums * shrink[:, None] + product, sums)
                total = total * shrink + tl.sum(p, 1)
                top = new_top

    place = row * H + head
    if SPLITS == 1:
        seen = row < 0
        for m in range(M):
            seen |= tl.load(begins_ptr + row * M + m, valid, 0) < tl.load(ends_ptr + row * M + m, valid, 0)
        o = tl.where(seen[:, None], sums / total[:, None], 0.0)
        tl.store(o_ptr + place[:, None] * D + d[None, :], o.to(o_ptr.dtype.element_ty), mask)
    else:
        place += split.to(tl.int64) * N * H
        tl.store(o_ptr + place[:, None] * D + d[None, :], sums, mask)
        tl.store(top_ptr + place, top, valid)
        tl.store(total_ptr + place, total, valid)


@triton.jit
def combine_kernel(
    sums_ptr,  # [SPLITS, N, H, D], contiguous
    top_ptr,  # [SPLITS, N, H], contiguous
    total_ptr,  # [SPLITS, N, H], contiguous
    begins_ptr,  # [N, M], contiguous
    ends_ptr,  # [N, M], contiguous
    o_ptr,  # [N, H, D], contiguous
    heads,  # N · H
    H,
    M,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one row a program."""
    place = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    top = tl.load(top_ptr + place)
    for split in range(1, SPLITS):
        top = tl.maximum(top, tl.load(top_ptr + split * heads + place))
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.zeros((BLOCK_D,), sums_ptr.dtype.element_ty)
    total = tl.sum(sums, 0)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(top_ptr + split * heads + place) - shift)
        total += weight * tl.load(total_ptr + split * heads + place)
        sums += weight * tl.load(sums_ptr + (split * heads + place) * D + d, d < D, 0.0)
    seen = place < 0
    for m in range(M):
        at = place // H * M + m
        seen |= tl.load(begins_ptr + at) < tl.load(ends_ptr + at)
    o = tl.where(seen, sums / total, 0.0)
    tl.store(o_ptr + place * D + d, o.to(o_ptr.dtype.element_ty), d < D)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    sinks: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """`cogsym.ops.decode_attention.decode_attention_reference` by one kernel, by two where rows are few."""
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if q.numel() == 0:
        return o
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    begins, ends = begins.contiguous(), ends.contiguous()
    (N, H, D), (S, KV, _), M = q.shape, k.shape, begins.shape[1]
    tile = config(H // KV, D, q.element_size())
    programs = triton.cdiv(N, tile["ROWS"]) * KV
    fill = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device) // programs
    # A power of two, as each number of splits is another kernel. Ranges are not looked at: that would wait for the GPU.
    longest = S // (LEAST_BLOCKS * tile["BLOCK_K"])
    splits = 1 << max(0, min(fill, longest, MOST_SPLITS).bit_length() - 1)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums, top, total = o, None, None
    if splits > 1:
        sums = torch.empty(splits, N, H, D, dtype=compute, device=q.device)
        top, total = (torch.empty(splits, N, H, dtype=compute, device=q.device) for _ in range(2))
    with on_device(q):
        decode_attention_kernel[(triton.cdiv(N, tile["ROWS"]), KV, splits)](
            q,
            k,
            v,
            begins,
            ends,
            None if sinks is None else sinks.contiguous(),
            sums,
            top,
            total,
            N,
            M,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            H=H,
            G=H // KV,
            D=D,
            SCALE=scale,
            SOFT_CAP=soft_cap or 0.0,
            SPLITS=splits,
            **tile,
        )
        if splits > 1:
            combine_kernel[(N * H,)](
                sums,
                top,
                total,
                begins,
                ends,
                o,
                N * H,
                H,
                M,
                D=D,
                SPLITS=splits,
                BLOCK_D=triton.next_power_of_2(D),
                num_warps=1,
            )
    return o
