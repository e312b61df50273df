"""Triton kernels of `cogsym.ops.activation`, which holds the contract and the formulas.

silu and gelu_tanh are g · σ(k(g)), with k(g) = g for silu and k(g) = 2·√(2/π)·(g + 0.044715 g³) for gelu_tanh, because
(1 + tanh t) / 2 = σ(2t). So no tanh is needed, nothing cancels where g is far below zero, and the slope of both is

    act'(g) = σ(k) + g · σ(k) · (1 - σ(k)) · k'(g)

Bound by memory. Bytes moved for N elements of s bytes:

    gated_activation             3s·N    reads gate and up; writes z (2s·N without up)
    gated_activation_backward    5s·N    reads dz, gate and up; writes dgate and dup
                                         (4s·N for dgate alone; 3s·N for dup alone, which does not read up)

Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import Rows, on_device


def config(F: int) -> dict[str, int]:
    """Block and warps for rows of F elements: 8 elements a thread, one 16-byte load of bf16 from every input."""
    block = min(1024, triton.next_power_of_2(F))
    return {"BLOCK_F": block, "num_warps": max(1, block // 256)}


@triton.jit
def _sigmoids(g, KIND: tl.constexpr):
    """σ(k(g)) and 1 - σ(k(g)), neither by a difference, from an exp that cannot overflow."""
    k = g if KIND == "silu" else 1.5957691216057308 * (g + 0.044715 * g * g * g)
    small = tl.exp(-tl.abs(k))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(k >= 0.0, larger, smaller), tl.where(k >= 0.0, smaller, larger)


@triton.jit
def _activated(g, KIND: tl.constexpr):
    """act(g)"""
    if KIND == "relu":
        z = tl.where(g <= 0.0, 0.0, g)  # a NaN stays one
    elif KIND == "relu2":
        z = tl.where(g <= 0.0, 0.0, g * g)
    elif KIND == "gelu":
        z = g * (0.5 + 0.5 * tl.erf(g * 0.7071067811865476))
    else:
        sigmoid, _ = _sigmoids(g, KIND)
        z = g * sigmoid
    return z


@triton.jit
def _with_slope(g, KIND: tl.constexpr):
    """act(g), act'(g)"""
    if KIND == "relu":
        z = tl.where(g <= 0.0, 0.0, g)
        slope = tl.where(g > 0.0, 1.0, z)
    elif KIND == "relu2":
        z = tl.where(g <= 0.0, 0.0, g * g)
        slope = tl.where(g <= 0.0, 0.0, 2.0 * g)
    elif KIND == "gelu":
        share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        density = tl.exp(-0.5 * g * g) * 0.3989422804014327
        z = g * share
        # Where the density is 0, g may be infinite, and 0 · ∞ is not 0.
        slope = share + tl.where(density == 0.0, 0.0, g * density)
    else:
        sigmoid, complement = _sigmoids(g, KIND)
        z = g * sigmoid
        bend = z * complement
        if KIND == "gelu_tanh":
            # Where σ(k) or 1 - σ(k) is 0, k' may already be infinite.
            bend = tl.where(bend == 0.0, 0.0, bend * (1.5957691216057308 * (1.0 + 0.134145 * g * g)))
        slope = sigmoid + bend
    return z, slope


@triton.jit
def _offsets(row, col, inner, outer_stride, inner_stride):
    return row // inner * outer_stride + row % inner * inner_stride + col


@triton.jit
def forward_kernel(
    gate_ptr,  # [rows, F]
    up_ptr,  # [rows, F], or None: 1
    z_ptr,  # [rows, F], contiguous
    F,
    inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    KIND: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One block of one row a program."""
    compute: tl.constexpr = tl.float64 if gate_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = col < F
    g = tl.load(gate_ptr + _offsets(row, col, inner, gate_outer, gate_inner), mask, 0.0).to(compute)
    z = _activated(g, KIND)
    if up_ptr is not None:
        z *= tl.load(up_ptr + _offsets(row, col, inner, up_outer, up_inner), mask, 0.0).to(compute)
    tl.store(z_ptr + row * F + col, z.to(z_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dz_ptr,  # [rows, F]
    gate_ptr,  # [rows, F]
    up_ptr,  # [rows, F], read for dgate alone; or None: 1
    dgate_ptr,  # [rows, F], or None where it is not needed
    dup_ptr,  # [rows, F], or None where it is not needed
    F,
    inner,
    dz_outer,
    dz_inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    gradient_stride,  # of the rows of dgate and dup
    KIND: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One block of one row a program."""
    compute: tl.constexpr = tl.float64 if gate_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = col < F
    # Nothing reads these again.
    dz_offsets = _offsets(row, col, inner, dz_outer, dz_inner)
    dz = tl.load(dz_ptr + dz_offsets, mask, 0.0, eviction_policy="evict_first").to(compute)
    gate_offsets = _offsets(row, col, inner, gate_outer, gate_inner)
    g = tl.load(gate_ptr + gate_offsets, mask, 0.0, eviction_policy="evict_first").to(compute)
    act, slope = _with_slope(g, KIND)
    if dup_ptr is not None:
        tl.store(dup_ptr + row * gradient_stride + col, (dz * act).to(dup_ptr.dtype.element_ty), mask)
    if dgate_ptr is not None:
        if up_ptr is not None:
            up_offsets = _offsets(row, col, inner, up_outer, up_inner)
            dz *= tl.load(up_ptr + up_offsets, mask, 0.0, eviction_policy="evict_first").to(compute)
        tl.store(dgate_ptr + row * gradient_stride + col, (dz * slope).to(dgate_ptr.dtype.element_ty), mask)


def gated_activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """`cogsym.ops.activation.gated_activation_reference` by one kernel."""
    z = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if z.numel():
        rows = _rows(gate, gate if up is None else up)
        F = rows.tensors[0].shape[-1]
        tile = config(F)
        with on_device(gate):
            forward_kernel[(rows.count * triton.cdiv(F, tile["BLOCK_F"]),)](
                rows.tensors[0],
                None if up is None else rows.tensors[1],
                z,
                F,
                rows.inner,
                *rows.strides(0),
                *rows.strides(1),
                KIND=kind,
                **tile,
            )
    return z


def gated_activation_backward(
    dz: Tensor, gate: Tensor, up: Tensor | None, kind: str, need_dgate: bool, need_dup: bool
) -> Tensor:
    """`cogsym.ops.activation.gated_activation_backward_reference` by one kernel."""
    both = need_dgate and need_dup
    d = gate.new_empty(*gate.shape[:-1], gate.shape[-1] * (need_dgate + need_dup))
    if d.numel():
        # Side by side, the gradients have rows of their own length, and so nothing is one long row.
        tensors = (dz, gate, gate if up is None else up)
        rows = Rows(*tensors) if both else _rows(*tensors)
        F = rows.tensors[0].shape[-1]
        tile = config(F)
        with on_device(gate):
            backward_kernel[(rows.count * triton.cdiv(F, tile["BLOCK_F"]),)](
                *rows.tensors[:2],
                None if up is None else rows.tensors[2],
                d if need_dgate else None,
                (d[..., F:] if both else d) if need_dup else None,
                F,
                rows.inner,
                *rows.strides(0),
                *rows.strides(1),
                *rows.strides(2),
                2 * F if both else F,
                KIND=kind,
                **tile,
            )
    return d


def _rows(*tensors: Tensor) -> Rows:
    """Rows as they lie; contiguous tensors as one long row, so that no block but the last is partly empty."""
    return Rows(*(t.view(1, -1) for t in tensors)) if all(t.is_contiguous() for t in tensors) else Rows(*tensors)
