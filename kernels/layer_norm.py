"""Triton kernels of `cogsym.ops.layer_norm`, which holds the contract and the formulas.

All are bound by memory. Bytes moved for N rows of D elements of s bytes; γ and β come from cache after the first row:

    layer_norm             2s·N·D   reads x; writes y
    add_layer_norm         4s·N·D   reads x and residual; writes y and h
    layer_norm_backward    2s·N·D   reads dy and h
                         + s·N·D    writes dx, where it is needed
                         + s·N·D    reads dh, where one is given
                         + 8·P·D    writes and sums P partial dγ in fp32, where they are needed; as much for dβ

Rows too long for registers (`LONGEST_ROW`) are read twice, the second time from cache at best. Compiled for NVIDIA and
AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import Rows, multiprocessors, on_device

# 16 elements a thread in 16 warps forward, and 8 backward, where five such rows are alive at once.
LONGEST_ROW = 8192
LONGEST_ROW_BACKWARD = 4096
COLUMN_BLOCK = 2048
BACKWARD_WARPS_PER_MULTIPROCESSOR = 32


def config(D: int, longest_row: int, per_thread: int) -> dict[str, int]:
    """Block and warps for rows of D elements: a whole row, or a block of its columns."""
    block = COLUMN_BLOCK if longest_row < D else triton.next_power_of_2(D)
    return {"BLOCK_D": block, "num_warps": max(1, min(16, block // (32 * per_thread)))}


@triton.jit
def _row(row, inner, outer_stride, inner_stride):
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _load_h(x_row, residual_row, col, mask, compute: tl.constexpr):
    """x, or x + residual rounded to the dtype it is stored in: the norm must see what the residual stream holds."""
    h = tl.load(x_row + col, mask, 0.0).to(compute)
    if residual_row is not None:
        h += tl.load(residual_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
        h = h.to(x_row.dtype.element_ty).to(compute)
    return h


@triton.jit
def _statistics(x_row, residual_row, D: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, compute: tl.constexpr):
    """mean and r of a row, block by block: each block's squares are those about its own mean (Chan et al., 1979)."""
    mean, squares, seen = tl.zeros((), compute), tl.zeros((), compute), tl.zeros((), compute)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        h = _load_h(x_row, residual_row, col, col < D, compute)
        count = tl.minimum(D - start, BLOCK_D).to(compute)
        own = tl.sum(h, 0) / count
        centred = tl.where(col < D, h - own, 0.0)
        apart = own - mean
        squares += tl.sum(centred * centred, 0) + apart * apart * (seen * count / (seen + count))
        mean += apart * (count / (seen + count))
        seen += count
    return mean, 1.0 / tl.sqrt(squares / D + EPS)


@triton.jit
def _scaled(n, weight_ptr, bias_ptr, col, D: tl.constexpr, OFFSET: tl.constexpr, compute: tl.constexpr):
    y = n * (OFFSET + tl.load(weight_ptr + col, col < D, 0.0, eviction_policy="evict_last").to(compute))
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, col < D, 0.0, eviction_policy="evict_last").to(compute)
    return y


@triton.jit
def forward_kernel(
    x_ptr,  # [rows, D]
    residual_ptr,  # [rows, D] or None
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    y_ptr,  # [rows, D], contiguous
    h_ptr,  # [rows, D], contiguous; None without residual
    inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    D: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row a program; two loops over blocks of columns where BLOCK_D < D."""
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + _row(row, inner, x_outer, x_inner)
    residual_row = None
    if residual_ptr is not None:
        residual_row = residual_ptr + _row(row, inner, residual_outer, residual_inner)
    if BLOCK_D >= D:
        col = tl.arange(0, BLOCK_D)
        mask = col < D
        h = _load_h(x_row, residual_row, col, mask, compute)
        centred = tl.where(mask, h - tl.sum(h, 0) / D, 0.0)
        n = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS))
        tl.store(y_ptr + row * D + col, _scaled(n, weight_ptr, bias_ptr, col, D, OFFSET, compute).to(dtype), mask)
        if h_ptr is not None:
            tl.store(h_ptr + row * D + col, h.to(dtype), mask)
    else:
        mean, r = _statistics(x_row, residual_row, D, EPS, BLOCK_D, compute)
        for start in range(0, D, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            mask = col < D
            h = _load_h(x_row, residual_row, col, mask, compute)
            y = _scaled((h - mean) * r, weight_ptr, bias_ptr, col, D, OFFSET, compute)
            tl.store(y_ptr + row * D + col, y.to(dtype), mask)
            if h_ptr is not None:
                tl.store(h_ptr + row * D + col, h.to(dtype), mask)


@triton.jit
def statistics_kernel(
    dy_ptr,  # [rows, D]
    h_ptr,  # [rows, D]
    weight_ptr,  # [D]
    statistics_ptr,  # [rows, 4], contiguous: mean, r, mean(g) and mean(g · n)
    inner,
    dy_outer,
    dy_inner,
    h_outer,
    h_inner,
    D: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """First half of the backward pass: one row a program."""
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    h_row, dy_row = h_ptr + _row(row, inner, h_outer, h_inner), dy_ptr + _row(row, inner, dy_outer, dy_inner)
    mean, r = _statistics(h_row, None, D, EPS, BLOCK_D, compute)
    sums, products = tl.zeros((BLOCK_D,), compute), tl.zeros((BLOCK_D,), compute)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        g = _scaled(tl.load(dy_row + col, col < D, 0.0).to(compute), weight_ptr, None, col, D, OFFSET, compute)
        n = tl.where(col < D, (tl.load(h_row + col, col < D, 0.0).to(compute) - mean) * r, 0.0)
        sums += g
        products += g * n
    tl.store(statistics_ptr + row * 4, mean)
    tl.store(statistics_ptr + row * 4 + 1, r)
    tl.store(statistics_ptr + row * 4 + 2, tl.sum(sums, 0) / D)
    tl.store(statistics_ptr + row * 4 + 3, tl.sum(products, 0) / D)


@triton.jit
def backward_kernel(
    dy_ptr,  # [rows, D]
    h_ptr,  # [rows, D]
    weight_ptr,  # [D]
    dh_ptr,  # [rows, D] or None
    dx_ptr,  # [rows, D], contiguous, or None where it is not needed
    dweight_ptr,  # [programs, D], partial sums, or None where it is not needed
    dbias_ptr,  # like dweight_ptr
    statistics_ptr,  # [rows, 4], contiguous
    rows,
    inner,
    dy_outer,
    dy_inner,
    h_outer,
    h_inner,
    dh_outer,
    dh_inner,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Second half: one block of columns a program, stepping through rows by the size of the grid."""
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = col < D
    if dx_ptr is not None:
        scale = OFFSET + tl.load(weight_ptr + col, mask, 0.0).to(compute)
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_D,), compute)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_D,), compute)
    for row in range(tl.program_id(1).to(tl.int64), rows, tl.num_programs(1)):
        h_row, dy_row = h_ptr + _row(row, inner, h_outer, h_inner), dy_ptr + _row(row, inner, dy_outer, dy_inner)
        dy = tl.load(dy_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
        h = tl.load(h_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
        r = tl.load(statistics_ptr + row * 4 + 1)
        n = (h - tl.load(statistics_ptr + row * 4)) * r
        if dweight_ptr is not None:
            dweight += dy * n
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            shift, slope = tl.load(statistics_ptr + row * 4 + 2), tl.load(statistics_ptr + row * 4 + 3)
            dx = r * (dy * scale - shift - n * slope)
            if dh_ptr is not None:
                dh_row = dh_ptr + _row(row, inner, dh_outer, dh_inner)
                dx += tl.load(dh_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
            tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(1).to(tl.int64) * D + col, dweight, mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(1).to(tl.int64) * D + col, dbias, mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    """`cogsym.ops.layer_norm.layer_norm_reference` by one kernel."""
    return _forward(x, None, weight, bias, eps, offset)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """`cogsym.ops.layer_norm.add_layer_norm_reference` by one kernel."""
    return _forward(x, residual, weight, bias, eps, offset)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """(y, h), h being x without a residual."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return y, h
    rows = Rows(x, x if residual is None else residual)
    D = x.shape[-1]
    with on_device(x):
        forward_kernel[(rows.count,)](
            rows.tensors[0],
            None if residual is None else rows.tensors[1],
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            None if residual is None else h,
            rows.inner,
            *rows.strides(0),
            *rows.strides(1),
            D=D,
            EPS=eps,
            OFFSET=offset,
            **config(D, LONGEST_ROW, 16),
        )
    return y, h


def layer_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    dh: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cogsym.ops.layer_norm.layer_norm_backward_reference` by two kernels.

    The partial sums of dweight and dbias are added in a fixed order: the same GPU model gives the same bits.
    """
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dx else h.new_empty(0)
    if h.numel() == 0 or not (need_dx or need_dweight or need_dbias):
        dweight, dbias = (weight.new_zeros(len(weight) * need) for need in (need_dweight, need_dbias))
        return dx, dweight, dbias
    D = h.shape[-1]
    rows = Rows(dy, h, h if dh is None else dh)
    compute = torch.promote_types(h.dtype, torch.float32)
    tile = config(D, LONGEST_ROW_BACKWARD, 8)
    column_blocks = triton.cdiv(D, tile["BLOCK_D"])
    warps = multiprocessors(h.device) * BACKWARD_WARPS_PER_MULTIPROCESSOR
    programs = min(rows.count, max(1, warps // (tile["num_warps"] * column_blocks)))
    partial = [
        torch.empty(programs, D, dtype=compute, device=h.device) if need else None
        for need in (need_dweight, need_dbias)
    ]
    statistics = torch.empty(rows.count, 4, dtype=compute, device=h.device)
    tensors = (rows.tensors[0], rows.tensors[1], weight.contiguous())
    strides = (*rows.strides(0), *rows.strides(1))
    with on_device(h):
        statistics_kernel[(rows.count,)](
            *tensors, statistics, rows.inner, *strides, D=D, EPS=eps, OFFSET=offset, **tile
        )
        backward_kernel[(column_blocks, programs)](
            *tensors,
            None if dh is None else rows.tensors[2],
            dx if need_dx else None,
            *partial,
            statistics,
            rows.count,
            rows.inner,
            *strides,
            *rows.strides(2),
            D=D,
            OFFSET=offset,
            **tile,
        )
    dweight, dbias = (weight.new_empty(0) if p is None else p.sum(0).to(weight.dtype) for p in partial)
    return dx, dweight, dbias
