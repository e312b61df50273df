"""Triton kernels of `cogsym.ops.linear_cross_entropy`: what happens to a block of logits between two products.

The products are cuBLAS's, by torch.mm; `cogsym.ops.logit_blocks` holds the contract of each kernel. All are bound by
memory. Bytes moved for a block of N x W logits of s bytes, and products of N x D:

    online_softmax     s·N·W      reads the logits twice, the second time from cache at best
                     + s·N·W      writes exponentials, where a gradient goes along
    add_rescaled       (8 + s)·N·D
    logits_gradient    2s·N·W

Compiled for NVIDIA and AMD and checked in Triton's interpreter; not run on a GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cogsym.kernels.common import on_device


def config(width: int) -> dict[str, int]:
    """Columns that a program holds at a time and its warps: 8 elements a thread, one 16-byte load of bfloat16."""
    block = min(2048, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


@triton.jit
def _logit(z, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """The logit and its slope in the product z.

    tanh u = (1 - e) / (1 + e) and 1 - tanh² u = 4e / (1 + e)² with e = exp(-2|u|), which cannot overflow; near 0, where
    1 - e cancels, tanh is Cephes' polynomial for float32.
    """
    if SOFT_CAP == 0.0:
        # Constants take the type of what they meet, and alone they are float32: so 1 · SCALE, not SCALE.
        x, slope = z * SCALE, tl.full(z.shape, 1.0, z.dtype) * SCALE
    else:
        u = z * (SCALE / SOFT_CAP)
        small = tl.exp(-2.0 * tl.abs(u))
        inverse = 1.0 / (1.0 + small)
        tanh = (1.0 - small) * inverse
        tanh = tl.where(u < 0.0, -tanh, tanh)
        if z.dtype == tl.float32:
            s = u * u
            p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
            tanh = tl.where(tl.abs(u) < 0.625, (p - 3.33332819422e-1) * s * u + u, tanh)
        x, slope = SOFT_CAP * tanh, SCALE * 4.0 * small * inverse * inverse
    return x, slope


@triton.jit
def online_softmax_kernel(
    logits_ptr,  # [rows, width], contiguous
    targets_ptr,  # [rows]
    maximum_ptr,  # [rows], like all that follow
    total_ptr,
    target_logit_ptr,
    rescale_ptr,
    logit_sum_ptr,  # None where not wanted
    argmax_ptr,  # None where not wanted
    width,
    first,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    EXPONENTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    compute: tl.constexpr = maximum_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    target = tl.load(targets_ptr + row) - first
    here = (target >= 0) & (target < width)
    # Read before any warp can have written there: the reduction below is a barrier.
    target_product = tl.load(logits_ptr + target, here, 0.0).to(compute)

    best = tl.full([BLOCK], float("-inf"), compute)
    place = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + col, col < width, float("-inf")).to(compute)
        greater = z > best
        best = tl.where(greater, z, best)
        if argmax_ptr is not None:
            place = tl.where(greater, col, place)
    block_maximum = tl.max(best, 0)
    before = tl.load(maximum_ptr + row)
    maximum = tl.maximum(before, block_maximum)
    if argmax_ptr is not None:
        smallest = tl.min(tl.where(best == block_maximum, place, width), 0)
        tl.store(argmax_ptr + row, first + smallest.to(tl.int64), block_maximum > before)

    shift, _ = _logit(maximum, SCALE, SOFT_CAP)
    # Where all are -inf so far, any finite shift makes the exponentials 0.
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    shift_before, _ = _logit(before, SCALE, SOFT_CAP)
    rescale = tl.exp(shift_before - shift)
    total = tl.zeros([BLOCK], compute)
    logit_sum = tl.zeros([BLOCK], compute)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < width
        x, slope = _logit(tl.load(logits_ptr + col, mask, 0.0).to(compute), SCALE, SOFT_CAP)
        e = tl.where(mask, tl.exp(x - shift), 0.0)
        total += e
        if logit_sum_ptr is not None:
            logit_sum += tl.where(mask, x, 0.0)
        if EXPONENTIALS:
            e = tl.where(col == target, 0.0, e * slope)
            tl.store(logits_ptr + col, e.to(logits_ptr.dtype.element_ty), mask)

    tl.store(maximum_ptr + row, maximum)
    tl.store(rescale_ptr + row, rescale)
    tl.store(total_ptr + row, tl.load(total_ptr + row) * rescale + tl.sum(total, 0))
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + tl.sum(logit_sum, 0))
    target_logit, _ = _logit(target_product, SCALE, SOFT_CAP)
    tl.store(target_logit_ptr + row, target_logit, here)


@triton.jit
def add_rescaled_kernel(
    total_ptr,  # [rows, D], contiguous
    product_ptr,  # [rows, D], contiguous
    rescale_ptr,  # [rows]
    D,
    BLOCK: tl.constexpr,
):
    """One block of one row a program."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    offset, mask = row * D + col, col < D
    total = tl.load(total_ptr + offset, mask, 0.0)
    product = tl.load(product_ptr + offset, mask, 0.0).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + offset, total * tl.load(rescale_ptr + row) + product, mask)


@triton.jit
def logits_gradient_kernel(
    logits_ptr,  # [rows, width], contiguous
    targets_ptr,  # [rows]
    logsumexp_ptr,  # [rows]
    dloss_ptr,  # [rows]
    width,
    first,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row a program."""
    compute: tl.constexpr = logsumexp_ptr.dtype.element_ty
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    offset, mask = row * width + col, col < width
    x, slope = _logit(tl.load(logits_ptr + offset, mask, 0.0).to(compute), SCALE, SOFT_CAP)
    dx = tl.exp(x - tl.load(logsumexp_ptr + row)) - FLOOR
    dx = tl.where(col == tl.load(targets_ptr + row) - first, dx - CONFIDENCE, dx)
    gradient = tl.load(dloss_ptr + row) * slope * dx
    tl.store(logits_ptr + offset, gradient.to(logits_ptr.dtype.element_ty), mask)


def online_softmax(
    logits: Tensor,
    first: int,
    targets: Tensor,
    state: Any,  # cogsym.ops.logit_blocks.OnlineState, a floor above
    rescale: Tensor,
    scale: float,
    soft_cap: float,
    exponentials: bool,
) -> None:
    """`cogsym.ops.logit_blocks.online_softmax_reference` by one kernel."""
    rows, width = logits.shape
    with on_device(logits):
        online_softmax_kernel[(rows,)](
            logits,
            targets,
            state.maximum,
            state.total,
            state.target_logit,
            rescale,
            state.logit_sum,
            state.argmax,
            width,
            first,
            SCALE=scale,
            SOFT_CAP=soft_cap,
            EXPONENTIALS=exponentials,
            **config(width),
        )


def add_rescaled(total: Tensor, product: Tensor, rescale: Tensor) -> None:
    """`cogsym.ops.logit_blocks.add_rescaled_reference` by one kernel."""
    rows, D = product.shape
    tile = config(D)
    with on_device(product):
        add_rescaled_kernel[(rows * triton.cdiv(D, tile["BLOCK"]),)](total, product, rescale, D, **tile)


def logits_gradient(
    logits: Tensor,
    first: int,
    targets: Tensor,
    logsumexp: Tensor,
    dloss: Tensor,
    scale: float,
    soft_cap: float,
    confidence: float,
    floor: float,
) -> None:
    """`cogsym.ops.logit_blocks.logits_gradient_reference` by one kernel."""
    rows, width = logits.shape
    tile = config(width)
    with on_device(logits):
        logits_gradient_kernel[(rows * triton.cdiv(width, tile["BLOCK"]),)](
            logits,
            targets,
            logsumexp,
            dloss,
            width,
            first,
            SCALE=scale,
            SOFT_CAP=soft_cap,
            CONFIDENCE=confidence,
            FLOOR=floor,
            **tile,
        )
