"""Triton kernels of `cogsym.ops.activation`, which holds the contract and the formulas.

Both activations are g · σ(k(g)), with k(g) = g for silu and k(g) = 2·√(2/π)·(g + 0.044715 g³) for gelu_tanh, because
(1 + tanh t) / 2 = σ(2t). So no tanh is needed, nothing cancels where g is far below zero, and the slope of both is

    act'(g) = σ(k) + g · σ(k) · (1 - σ(k)) · k'(g)

Bound by memory. Bytes moved for N elements of s bytes:

    gated_activation             3s·N    reads gate and up; writes z
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
def _sigmoids(g, ACTIVATION: tl.constexpr):
    """σ(k(g)) and 1 - σ(k(g)), neither by a difference, from an exp that cannot overflow."""
    k = g if ACTIVATION == "silu" else 1.5957691216057308 * (g + 0.044715 * g * g * g)
    small = tl.exp(-tl.abs(k))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(k >= 0.0, larger, smaller), tl.where(k >= 0.0, smaller, larger)


@triton.jit
def _offsets(row, col, inner, outer_stride, inner_stride):
    return row // inner * outer_stride + row % inner * inner_stride + col


@triton.jit
def forward_kernel(
    gate_ptr,  # [rows, F]
    up_ptr,  # [rows, F]
    z_ptr,  # [rows, F], contiguous
    F,
    inner,
    gate_outer,
    gate_inner,
    up_outer,
    up_inner,
    ACTIVATION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One block of one row a program."""
    compute: tl.constexpr = tl.float64 if gate_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = col < F
    g = tl.load(gate_ptr + _offsets(row, col, inner, gate_outer, gate_inner), mask, 0.0).to(compute)
    u = tl.load(up_ptr + _offsets(row, col, inner, up_outer, up_inner), mask, 0.0).to(compute)
    sigmoid, _ = _sigmoids(g, ACTIVATION)
    z = g * sigmoid * u
    tl.store(z_ptr + row * F + col, z.to(z_ptr.dtype.element_ty), mask)


@triton.jit
def backward_kernel(
    dz_ptr,  # [rows, F]
    gate_ptr,  # [rows, F]
    up_ptr,  # [rows, F], read for dgate alone
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
    ACTIVATION: tl.constexpr,
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
    sigmoid, complement = _sigmoids(g, ACTIVATION)
    act = g * sigmoid
    if dup_ptr is not None:
        tl.store(dup_ptr + row * gradient_stride + col, (dz * act).to(dup_ptr.dtype.element_ty), mask)
    if dgate_ptr is not None:
        up_offsets = _offsets(row, col, inner, up_outer, up_inner)
        u = tl.load(up_ptr + up_offsets, mask, 0.0, eviction_policy="evict_first").to(compute)
        bend = act * complement
        if ACTIVATION == "gelu_tanh":
            # Where σ(k) or 1 - σ(k) is 0, k' may already be infinite, and 0 · ∞ is not 0.
            bend = tl.where(bend == 0.0, 0.0, bend * (1.5957691216057308 * (1.0 + 0.134145 * g * g)))
        tl.store(
            dgate_ptr + row * gradient_stride + col, (dz * u * (sigmoid + bend)).to(dgate_ptr.dtype.element_ty), mask
        )


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`cogsym.ops.activation.gated_activation_reference` by one kernel."""
    z = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if z.numel():
        rows = _rows(gate, up)
        F = rows.tensors[0].shape[-1]
        tile = config(F)
        with on_device(gate):
            forward_kernel[(rows.count * triton.cdiv(F, tile["BLOCK_F"]),)](
                *rows.tensors, z, F, rows.inner, *rows.strides(0), *rows.strides(1), ACTIVATION=activation, **tile
            )
    return z


def gated_activation_backward(
    dz: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> Tensor:
    """`cogsym.ops.activation.gated_activation_backward_reference` by one kernel."""
    both = need_dgate and need_dup
    d = gate.new_empty(*gate.shape[:-1], gate.shape[-1] * (need_dgate + need_dup))
    if d.numel():
        # Side by side, the gradients have rows of their own length, and so nothing is one long row.
        rows = Rows(dz, gate, up) if both else _rows(dz, gate, up)
        F = rows.tensors[0].shape[-1]
        tile = config(F)
        with on_device(gate):
            backward_kernel[(rows.count * triton.cdiv(F, tile["BLOCK_F"]),)](
                *rows.tensors,
                d if need_dgate else None,
                (d[..., F:] if both else d) if need_dup else None,
                F,
                rows.inner,
                *rows.strides(0),
                *rows.strides(1),
                *rows.strides(2),
                2 * F if both else F,
                ACTIVATION=activation,
                **tile,
            )
    return d


def _rows(*tensors: Tensor) -> Rows:
    """Rows as they lie; contiguous tensors as one long row, so that no block but the last is partly empty."""
    return Rows(*(t.view(1, -1) for t in tensors)) if all(t.is_contiguous() for t in tensors) else Rows(*tensors)
