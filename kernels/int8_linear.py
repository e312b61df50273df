"""Triton kernel of `cogsym.ops.int8_linear`: a weight of 8-bit integers is widened tile by tile, and never in memory.

For few rows, whose time is that of reading the weight: a byte each here, where the product with a widened copy reads
one, writes two and reads two. What x is multiplied with holds an integer exactly, so that in the forward product the
scales of the rows are applied to the sums; in the gradient they lie along the sums, and a weight is rounded to the type
of dy.

Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import inner_contiguous, on_device

MOST_ROWS = 32  # a tile's; more are other products' work


@triton.jit
def int8_product_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K], or where not TRANSPOSED [K, N]
    scale_ptr,  # of each row of the weight
    bias_ptr,  # [N], or None
    out_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    x_stride,
    weight_stride,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All rows of some columns of the outcome a program."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    left = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < K)[:, None] & (columns < N)[None]
        x = tl.load(left + k[None], (rows < M)[:, None] & (k < K)[None], 0.0)
        if TRANSPOSED:
            offset = columns.to(tl.int64)[None] * weight_stride + k[:, None]
            weight = tl.load(weight_ptr + offset, inside, 0).to(tl.float32).to(x.dtype)
        else:
            offset = k.to(tl.int64)[:, None] * weight_stride + columns[None]
            scale = tl.load(scale_ptr + k, k < K, 0.0)
            weight = (tl.load(weight_ptr + offset, inside, 0).to(tl.float32) * scale[:, None]).to(x.dtype)
        sums += tl.dot(x, weight, input_precision=PRECISION, out_dtype=tl.float32)
    if TRANSPOSED:
        sums *= tl.load(scale_ptr + columns, columns < N, 0.0)[None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + columns, columns < N, 0.0).to(tl.float32)[None]
    out = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None])


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`cogsym.ops.int8_linear`, of at most `MOST_ROWS` rows."""
    return _product(x, weight, scale, bias, True)


def int8_linear_input_gradient(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`cogsym.ops.int8_linear_input_gradient`, likewise."""
    return _product(dy, weight, scale, None, False)


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    N, K = weight.shape if transposed else weight.shape[::-1]
    out = x.new_empty(*x.shape[:-1], N)
    rows, weight = inner_contiguous(x.reshape(-1, K)), inner_contiguous(weight)
    block = 32
    if out.numel():
        with on_device(x):
            int8_product_kernel[(triton.cdiv(N, block),)](
                rows,
                weight,
                scale.float().contiguous(),
                None if bias is None else bias.contiguous(),
                out,
                len(rows),
                N,
                K,
                rows.stride(0),
                weight.stride(0),
                TRANSPOSED=transposed,
                # Three products of tf32 are as exact as float32, on tensor cores; AMD's have no such.
                PRECISION="tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee",
                BLOCK_M=16 if len(rows) <= 16 else MOST_ROWS,
                BLOCK_N=block,
                BLOCK_K=64,
                num_warps=4,
                num_stages=3,
            )
    return out
