"""Triton kernels of `cogsym.ops.rms_norm`, which holds the contract and the formulas.

All are bound by memory. Bytes moved for N rows of D elements of s bytes; γ comes from cache after the first program:

    rms_norm             2s·N·D   reads x; writes y
    add_rms_norm         4s·N·D   reads x and residual; writes y and h
    rms_norm_backward    2s·N·D   reads dy and h
                       + s·N·D    writes dx, where it is needed
                       + s·N·D    reads dh, where one is given
                       + 8·P·D    writes and sums P partial dγ in fp32, where it is needed

Rows too long for registers (`LONGEST_ROW`) are read twice, the second time from cache at best. Compiled for NVIDIA and
AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import Rows, multiprocessors, on_device

# 32 elements a thread in 16 warps forward, and 16 backward, where five such rows are alive at once.
LONGEST_ROW = 16384
LONGEST_ROW_BACKWARD = 8192
# Up to here the backward kernel has registers for the next row too, which is on its way while one is computed.
LONGEST_ROW_PREFETCHED = 4096
COLUMN_BLOCK = 2048
# As many as are resident at once, by the registers of the backward kernel on every target compiled for; more of them
# would only be more partial sums.
BACKWARD_WARPS_PER_MULTIPROCESSOR = 16
# Of the kernel for long rows, which needs fewer.
LONG_BACKWARD_WARPS_PER_MULTIPROCESSOR = 32


def config(D: int) -> dict[str, int]:
    """Tile and warps of the forward kernel for rows of D elements, 16 of them a thread where 16 warps suffice."""
    return _tile(triton.next_power_of_2(D) if D <= LONGEST_ROW else COLUMN_BLOCK, elements=2048, per_thread=16)


def backward_config(D: int) -> dict[str, int]:
    """Tile and warps of the backward kernel, or of the two that share its work on long rows: 16 elements a thread, two
    16-byte loads of bfloat16."""
    if D <= LONGEST_ROW_BACKWARD:
        return _tile(triton.next_power_of_2(D), elements=1024, per_thread=16)
    return _tile(COLUMN_BLOCK, elements=COLUMN_BLOCK, per_thread=16)


def _tile(columns: int, elements: int, per_thread: int) -> dict[str, int]:
    """Whole rows, several where they are short, or a block of columns of one row."""
    rows = max(1, min(32, elements // columns))
    return {"BLOCK_ROWS": rows, "BLOCK_D": columns, "num_warps": max(1, min(16, rows * columns // (32 * per_thread)))}


@triton.jit
def _offsets(row, inner, outer_stride, inner_stride):
    return (row // inner * outer_stride + row % inner * inner_stride)[:, None]


@triton.jit
def _load_h(x_row, residual_row, col, mask, compute: tl.constexpr, policy: tl.constexpr):
    """x, or x + residual rounded to the dtype it is stored in: the norm must see what the residual stream holds."""
    h = tl.load(x_row + col, mask, 0.0, eviction_policy=policy).to(compute)
    if residual_row is not None:
        h += tl.load(residual_row + col, mask, 0.0, eviction_policy=policy).to(compute)
        h = h.to(x_row.dtype.element_ty).to(compute)
    return h


@triton.jit
def _load_scale(weight_ptr, col, D: tl.constexpr, OFFSET: tl.constexpr, compute: tl.constexpr):
    return OFFSET + tl.load(weight_ptr + col, col < D, 0.0, eviction_policy="evict_last").to(compute)


@triton.jit
def _inverse_rms(sum_of_squares, D: tl.constexpr, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(sum_of_squares / D + EPS)


@triton.jit
def forward_kernel(
    x_ptr,  # [rows, D]
    residual_ptr,  # [rows, D] or None
    weight_ptr,  # [D]
    y_ptr,  # [rows, D], contiguous
    h_ptr,  # [rows, D], contiguous; None without residual
    rows,
    inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    D: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_ROWS rows a program; two loops over blocks of columns where BLOCK_D < D."""
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = (row < rows)[:, None]
    x_row = x_ptr + _offsets(row, inner, x_outer, x_inner)
    residual_row = None
    if residual_ptr is not None:
        residual_row = residual_ptr + _offsets(row, inner, residual_outer, residual_inner)
    out = row[:, None] * D
    col = tl.arange(0, BLOCK_D)[None, :]

    if BLOCK_D >= D:
        mask = row_mask & (col < D)
        # x alone is the residual stream, which is read again soon; summands are not.
        h = _load_h(x_row, residual_row, col, mask, compute, "" if residual_ptr is None else "evict_first")
        y = h * _inverse_rms(tl.sum(h * h, 1, keep_dims=True), D, EPS)
        y *= _load_scale(weight_ptr, col, D, OFFSET, compute)
        tl.store(y_ptr + out + col, y.to(dtype), mask)
        if h_ptr is not None:
            tl.store(h_ptr + out + col, h.to(dtype), mask)
    else:
        squares = tl.zeros((BLOCK_ROWS, BLOCK_D), compute)
        for start in range(0, D, BLOCK_D):
            h = _load_h(x_row, residual_row, start + col, row_mask & (start + col < D), compute, "evict_last")
            squares += h * h
        r = _inverse_rms(tl.sum(squares, 1, keep_dims=True), D, EPS)
        for start in range(0, D, BLOCK_D):
            mask = row_mask & (start + col < D)
            h = _load_h(x_row, residual_row, start + col, mask, compute, "evict_first")
            y = h * r * _load_scale(weight_ptr, start + col, D, OFFSET, compute)
            tl.store(y_ptr + out + start + col, y.to(dtype), mask)
            if h_ptr is not None:
                tl.store(h_ptr + out + start + col, h.to(dtype), mask)


@triton.jit
def _load_rows(
    dy_ptr, h_ptr, dh_ptr, row, rows, inner,
    dy_outer, dy_inner, h_outer, h_inner, dh_outer, dh_inner, col, D: tl.constexpr,
):  # fmt: skip
    """dy, h and dh of some rows, all asked for before any is waited for; without a dh dy stands for it, unused."""
    mask = (row < rows)[:, None] & (col < D)
    dy_row = dy_ptr + _offsets(row, inner, dy_outer, dy_inner)
    dy = tl.load(dy_row + col, mask, 0.0, eviction_policy="evict_first")
    h = tl.load(h_ptr + _offsets(row, inner, h_outer, h_inner) + col, mask, 0.0)
    dh = dy
    if dh_ptr is not None:
        dh_row = dh_ptr + _offsets(row, inner, dh_outer, dh_inner)
        dh = tl.load(dh_row + col, mask, 0.0, eviction_policy="evict_first")
    return dy, h, dh


@triton.jit
def backward_kernel(
    dy_ptr,  # [rows, D]
    h_ptr,  # [rows, D]
    weight_ptr,  # [D]
    dh_ptr,  # [rows, D] or None
    dx_ptr,  # [rows, D], contiguous, or None where it is not needed
    dweight_ptr,  # [programs, D], partial sums, or None where it is not needed
    rows,
    inner,
    dy_outer,
    dy_inner,
    h_outer,
    h_inner,
    dh_outer,
    dh_inner,
    D: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Whole rows: a program steps through them by the size of the grid, its partial dweight in registers."""
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    col = tl.arange(0, BLOCK_D)[None, :]
    if dx_ptr is not None:
        scale = _load_scale(weight_ptr, col, D, OFFSET, compute)
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_D), compute)

    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    step = tl.num_programs(0) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    next_dy, next_h, next_dh = _load_rows(
        dy_ptr, h_ptr, dh_ptr, row, rows, inner,
        dy_outer, dy_inner, h_outer, h_inner, dh_outer, dh_inner, col, D,
    )  # fmt: skip
    for start in range(first, rows, step):
        row = start + tl.arange(0, BLOCK_ROWS)
        dy, h, dh = next_dy.to(compute), next_h.to(compute), next_dh
        if PREFETCH:
            next_dy, next_h, next_dh = _load_rows(
                dy_ptr, h_ptr, dh_ptr, row + step, rows, inner,
                dy_outer, dy_inner, h_outer, h_inner, dh_outer, dh_inner, col, D,
            )  # fmt: skip
        row_mask = (row < rows)[:, None]
        # A row beyond the end is all zeros: without eps its r would be infinite.
        r = tl.where(row_mask, _inverse_rms(tl.sum(h * h, 1, keep_dims=True), D, EPS), 0.0)
        if dweight_ptr is not None:
            dweight += dy * h * r
        if dx_ptr is not None:
            g = dy * scale
            dx = r * (g - h * (r * r * tl.sum(g * h, 1, keep_dims=True) / D))
            if dh_ptr is not None:
                dx += dh.to(compute)
            tl.store(dx_ptr + row[:, None] * D + col, dx.to(dx_ptr.dtype.element_ty), row_mask & (col < D))
        if not PREFETCH:
            next_dy, next_h, next_dh = _load_rows(
                dy_ptr, h_ptr, dh_ptr, row + step, rows, inner,
                dy_outer, dy_inner, h_outer, h_inner, dh_outer, dh_inner, col, D,
            )  # fmt: skip

    if dweight_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * D + col
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0, keep_dims=True), col < D)


@triton.jit
def long_statistics_kernel(
    dy_ptr,  # [rows, D]
    h_ptr,  # [rows, D]
    weight_ptr,  # [D]
    statistics_ptr,  # [rows, 2], contiguous: r and r³ · mean(g · h)
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
    """First half of the backward pass for long rows: one row a program."""
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    h_row = h_ptr + row // inner * h_outer + row % inner * h_inner
    dy_row = dy_ptr + row // inner * dy_outer + row % inner * dy_inner
    squares, products = tl.zeros((BLOCK_D,), compute), tl.zeros((BLOCK_D,), compute)
    for start in range(0, D, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_row + col, col < D, 0.0, eviction_policy="evict_last").to(compute)
        dy = tl.load(dy_row + col, col < D, 0.0, eviction_policy="evict_last").to(compute)
        squares += h * h
        products += dy * _load_scale(weight_ptr, col, D, OFFSET, compute) * h
    r = _inverse_rms(tl.sum(squares, 0), D, EPS)
    tl.store(statistics_ptr + row * 2, r)
    tl.store(statistics_ptr + row * 2 + 1, r * r * r * tl.sum(products, 0) / D)


@triton.jit
def long_backward_kernel(
    dy_ptr,  # [rows, D]
    h_ptr,  # [rows, D]
    weight_ptr,  # [D]
    dh_ptr,  # [rows, D] or None
    dx_ptr,  # [rows, D], contiguous, or None where it is not needed
    dweight_ptr,  # [programs, D], partial sums, or None where it is not needed
    statistics_ptr,  # [rows, 2], contiguous
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
    scale = _load_scale(weight_ptr, col, D, OFFSET, compute)
    dweight = tl.zeros((BLOCK_D,), compute)
    for row in range(tl.program_id(1).to(tl.int64), rows, tl.num_programs(1)):
        h_row = h_ptr + row // inner * h_outer + row % inner * h_inner
        dy_row = dy_ptr + row // inner * dy_outer + row % inner * dy_inner
        h = tl.load(h_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
        dy = tl.load(dy_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
        r = tl.load(statistics_ptr + row * 2)
        if dweight_ptr is not None:
            dweight += dy * h * r
        if dx_ptr is not None:
            dx = r * dy * scale - h * tl.load(statistics_ptr + row * 2 + 1)
            if dh_ptr is not None:
                dh_row = dh_ptr + row // inner * dh_outer + row % inner * dh_inner
                dx += tl.load(dh_row + col, mask, 0.0, eviction_policy="evict_first").to(compute)
            tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(1).to(tl.int64) * D + col, dweight, mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`cogsym.ops.rms_norm.rms_norm_reference` by one kernel."""
    return _forward(x, None, weight, eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`cogsym.ops.rms_norm.add_rms_norm_reference` by one kernel."""
    y, h = _forward(x, residual, weight, eps, offset)
    assert h is not None
    return y, h


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    if x.numel() == 0:
        return y, h
    rows = Rows(x) if residual is None else Rows(x, residual)
    D = x.shape[-1]
    tile = config(D)
    with on_device(x):
        forward_kernel[(triton.cdiv(rows.count, tile["BLOCK_ROWS"]),)](
            rows.tensors[0],
            None if residual is None else rows.tensors[1],
            weight.contiguous(),
            y,
            h,
            rows.count,
            rows.inner,
            *rows.strides(0),
            *((0, 0) if residual is None else rows.strides(1)),
            D=D,
            EPS=eps,
            OFFSET=offset,
            **tile,
        )
    return y, h


def rms_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    dh: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """`cogsym.ops.rms_norm.rms_norm_backward_reference` by one kernel, by two where rows are long.

    The partial sums of dweight are added in a fixed order: the same GPU model gives the same bits.
    """
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dx else None
    partial = None
    if h.numel() == 0:
        dweight = torch.zeros_like(weight) if need_dweight else weight.new_empty(0)
        return h.new_empty(0) if dx is None else dx, dweight
    if need_dx or need_dweight:
        partial = _backward(dy, h, weight, eps, offset, dh if need_dx else None, dx, need_dweight)
    dweight = weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)
    return h.new_empty(0) if dx is None else dx, dweight


def _backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    dh: Tensor | None,
    dx: Tensor | None,
    need_dweight: bool,
) -> Tensor | None:
    """Fills dx and returns the partial sums of dweight, [programs, D], each where it is needed."""
    D = h.shape[-1]
    rows = Rows(dy, h) if dh is None else Rows(dy, h, dh)
    compute = torch.float64 if h.dtype == torch.float64 else torch.float32
    tile = backward_config(D)
    column_blocks = triton.cdiv(D, tile["BLOCK_D"])
    programs = triton.cdiv(rows.count, tile["BLOCK_ROWS"])
    if need_dweight:
        resident = BACKWARD_WARPS_PER_MULTIPROCESSOR if column_blocks == 1 else LONG_BACKWARD_WARPS_PER_MULTIPROCESSOR
        warps = multiprocessors(h.device) * resident
        programs = min(programs, max(1, warps // (tile["num_warps"] * column_blocks)))
    partial = torch.empty(programs, D, dtype=compute, device=h.device) if need_dweight else None
    tensors = (rows.tensors[0], rows.tensors[1], weight.contiguous(), None if dh is None else rows.tensors[2])
    strides = (*rows.strides(0), *rows.strides(1))
    dh_strides = (0, 0) if dh is None else rows.strides(2)
    with on_device(h):
        if column_blocks == 1:
            # Without partial sums there is a program for each row, and no next one.
            prefetch = need_dweight and D <= LONGEST_ROW_PREFETCHED
            constants = {"D": D, "EPS": eps, "OFFSET": offset, "PREFETCH": prefetch, **tile}
            backward_kernel[(programs,)](
                *tensors, dx, partial, rows.count, rows.inner, *strides, *dh_strides, **constants
            )
        else:
            constants = {"D": D, "OFFSET": offset, "BLOCK_D": tile["BLOCK_D"], "num_warps": tile["num_warps"]}
            statistics = torch.empty(rows.count, 2, dtype=compute, device=h.device)
            long_statistics_kernel[(rows.count,)](*tensors[:3], statistics, rows.inner, *strides, EPS=eps, **constants)
            long_backward_kernel[(column_blocks, programs)](
                *tensors, dx, partial, statistics, rows.count, rows.inner, *strides, *dh_strides, **constants
            )
    return partial
