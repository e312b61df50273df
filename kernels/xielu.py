"""Triton kernels of `cogsym.ops.xielu`, which holds the contract and the formulas.

Bound by memory. Bytes moved for N elements of s bytes:

    xielu             2s·N    reads x; writes y
    xielu_backward    3s·N    reads dz and x; writes dx
                    + 8·P     writes and sums P partial sums of each α, where they are needed (2s·N without dx)

Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.activation import _offsets, _rows, config
from cogsym.kernels.common import on_device


@triton.jit
def _below(x, compute: tl.constexpr):
    """e^x - 1 and e^x - 1 - x for x <= 0: near 0, where they would cancel, from the series."""
    nearest: tl.constexpr = -0.01 if compute == tl.float64 else -0.3
    small = x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x / 40320)))))
    bent = x * x * (0.5 + small)
    far = tl.exp(x) - 1.0
    near = x > nearest
    return tl.where(near, x + bent, far), tl.where(near, bent, far - x)


@triton.jit
def forward_kernel(
    x_ptr,  # [rows, F]
    alpha_p_ptr,  # [1]
    alpha_n_ptr,  # [1]
    y_ptr,  # [rows, F], contiguous
    F,
    inner,
    x_outer,
    x_inner,
    BETA: tl.constexpr,
    EPS: tl.constexpr,
    AT_EPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One block of one row a program."""
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = col < F
    x = tl.load(x_ptr + _offsets(row, col, inner, x_outer, x_inner), mask, 0.0).to(compute)
    alpha_p, alpha_n = tl.load(alpha_p_ptr).to(compute), tl.load(alpha_n_ptr).to(compute)
    _, bent = _below(x, compute)
    bent = tl.where(x > EPS, AT_EPS - x, bent)
    y = tl.where(x > 0.0, alpha_p * x * x, alpha_n * bent) + BETA * x
    tl.store(y_ptr + row * F + col, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dz_ptr,  # [rows, F]
    x_ptr,  # [rows, F]
    alpha_p_ptr,  # [1]
    alpha_n_ptr,  # [1]
    dx_ptr,  # [rows, F], contiguous, or None where it is not needed
    dalphas_ptr,  # [2, programs] of the compute type, partial sums, or None where they are not needed
    F,
    inner,
    dz_outer,
    dz_inner,
    x_outer,
    x_inner,
    BETA: tl.constexpr,
    EPS: tl.constexpr,
    AT_EPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One block of one row a program."""
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = col < F
    dz_offsets = _offsets(row, col, inner, dz_outer, dz_inner)
    dz = tl.load(dz_ptr + dz_offsets, mask, 0.0, eviction_policy="evict_first").to(compute)
    x = tl.load(x_ptr + _offsets(row, col, inner, x_outer, x_inner), mask, 0.0).to(compute)
    slope, bent = _below(x, compute)
    if dx_ptr is not None:
        alpha_p, alpha_n = tl.load(alpha_p_ptr).to(compute), tl.load(alpha_n_ptr).to(compute)
        slope = tl.where(x >= EPS, -1.0, slope)
        dx = dz * (tl.where(x > 0.0, 2.0 * alpha_p * x, alpha_n * slope) + BETA)
        tl.store(dx_ptr + row * F + col, dx.to(dx_ptr.dtype.element_ty), mask)
    if dalphas_ptr is not None:
        bent = tl.where(x > EPS, AT_EPS - x, bent)
        above = tl.sum(tl.where(x > 0.0, dz * x * x, 0.0), 0)
        below = tl.sum(tl.where(x > 0.0, 0.0, dz * bent), 0)
        tl.store(dalphas_ptr + tl.program_id(0), above)
        tl.store(dalphas_ptr + tl.num_programs(0) + tl.program_id(0), below)


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """`cogsym.ops.xielu.xielu_reference` by one kernel."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        rows = _rows(x)
        F = rows.tensors[0].shape[-1]
        tile = config(F)
        with on_device(x):
            forward_kernel[(rows.count * triton.cdiv(F, tile["BLOCK_F"]),)](
                *rows.tensors, alpha_p, alpha_n, y, F, rows.inner, *rows.strides(0), **_constants(beta, eps), **tile
            )
    return y


def xielu_backward(
    dz: Tensor,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float,
    eps: float,
    need_dx: bool,
    need_dalphas: bool,
) -> tuple[Tensor, Tensor]:
    """`cogsym.ops.xielu.xielu_backward_reference` by one kernel; the partial sums are added in a fixed order."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    compute = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0 or not (need_dx or need_dalphas):
        return dx, x.new_zeros(2 * need_dalphas, dtype=compute)
    rows = _rows(dz, x)
    F = rows.tensors[0].shape[-1]
    tile = config(F)
    programs = rows.count * triton.cdiv(F, tile["BLOCK_F"])
    partial = torch.empty(2, programs, dtype=compute, device=x.device) if need_dalphas else None
    with on_device(x):
        backward_kernel[(programs,)](
            *rows.tensors,
            alpha_p,
            alpha_n,
            dx if need_dx else None,
            partial,
            F,
            rows.inner,
            *rows.strides(0),
            *rows.strides(1),
            **_constants(beta, eps),
            **tile,
        )
    return dx, x.new_empty(0, dtype=compute) if partial is None else partial.sum(1)


def _constants(beta: float, eps: float) -> dict[str, float]:
    return {"BETA": beta, "EPS": eps, "AT_EPS": math.expm1(eps)}
