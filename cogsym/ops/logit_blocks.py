"""The blocks of logits that `cogsym.ops.linear_cross_entropy` passes over, and the two passes.

A block is `width` columns of the vocabulary from `first` on, for some of the rows. It comes from a product as
hidden·weightᵀ, [rows, width] contiguous, and is overwritten by what the next product needs: three functions here are
the plain form of what the kernels do to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cogsym.ops import backend, cpp
from cogsym.ops.backend import Kernel
from cogsym.ops.linear import multiply_into

# (rows, columns) of a block at most. On a CPU: 8 MiB in bfloat16, which its cache keeps from one product to the other.
# On a GPU a block of N rows and W columns costs, in bytes of memory's traffic a logit in bfloat16, (18 / W + 2 / N)·D
# for what products read and for adding them up in float32, and 8 more where it is too large for the second-level cache
# and passes through memory four times. Narrow hidden states have blocks of 16 MiB (D = 576: 3 bytes, not 9), wide ones
# large blocks (D = 4096: 15 bytes, not 22); both cost the same at some 2,100. Computed, not measured.
BLOCKS = {"cpu": (2048, 2048), "cuda, narrow": (2048, 4096), "cuda, wide": (4096, 16384)}
NARROW = 2048  # hidden states of at most so many numbers


class OnlineState(NamedTuple):
    """Of each row, over the columns seen so far; float32 (float64 for float64), [rows]."""

    maximum: Tensor  # of the products hidden·weightᵀ
    total: Tensor  # Σ exp(logit - logit of the maximum)
    target_logit: Tensor
    logit_sum: Tensor | None  # None: not wanted
    argmax: Tensor | None  # int64; None: not wanted

    def rows(self, begin: int, end: int) -> OnlineState:
        """A view of some of the rows."""
        optional = [None if t is None else t[begin:end] for t in self[3:]]
        return OnlineState(*(t[begin:end] for t in self[:3]), *optional)

    def logsumexp(self, scale: float, soft_cap: float) -> Tensor:
        """Of the logits."""
        return capped(self.maximum, scale, soft_cap) + self.total.log()


def partial_dtype(x: Tensor) -> torch.dtype:
    """Of the products of `x` that are added up.

    A GPU's tensor cores add up in float32, which cuBLAS gives as it is; elsewhere each is rounded to the dtype of x.
    """
    return torch.float32 if x.is_cuda and x.dtype.itemsize == 2 and torch.version.hip is None else x.dtype


def compute_dtype(x: Tensor) -> Tensor:
    """`x` as float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def capped(product: Tensor, scale: float, soft_cap: float) -> Tensor:
    """Logits from products; `soft_cap` 0 is none."""
    return soft_cap * torch.tanh(product * (scale / soft_cap)) if soft_cap else product * scale


def _slope(logit: Tensor, scale: float, soft_cap: float) -> Tensor:
    """d logit / d product."""
    return scale * (1 - (logit / soft_cap).square()) if soft_cap else torch.full_like(logit, scale)


def online_softmax_reference(
    logits: Tensor,
    first: int,
    targets: Tensor,
    state: OnlineState,
    rescale: Tensor,
    scale: float,
    soft_cap: float,
    exponentials: bool,
) -> None:
    """Takes a block into `state`.

    Args:
        logits: the block; where `exponentials`, replaced by exp(logit - maximum) · d logit / d product, and 0 at the
            target.
        first: the block's first column.
        targets: [rows], int64, in [0, V).
        state: of the columns before; updated in place.
        rescale: [rows], written: exp(maximum before - maximum after).
        scale: as in `linear_cross_entropy`.
        soft_cap: likewise; 0 for none.
        exponentials: whether to replace the block.
    """
    products = compute_dtype(logits)
    x = capped(products, scale, soft_cap)
    block_maximum, place = products.max(-1)
    if state.argmax is not None:
        state.argmax.copy_(torch.where(block_maximum > state.maximum, first + place, state.argmax))
    before = capped(state.maximum, scale, soft_cap)
    state.maximum.copy_(torch.maximum(state.maximum, block_maximum))
    shift = capped(state.maximum, scale, soft_cap)
    shift = torch.where(shift == -torch.inf, 0, shift)
    rescale.copy_(torch.exp(before - shift))
    exponential = torch.exp(x - shift[:, None])
    state.total.mul_(rescale).add_(exponential.sum(-1))
    if state.logit_sum is not None:
        state.logit_sum.add_(x.sum(-1))
    here = (targets >= first) & (targets < first + logits.shape[1])
    column = torch.where(here, targets - first, 0)[:, None]
    state.target_logit.copy_(torch.where(here, x.gather(1, column)[:, 0], state.target_logit))
    if exponentials:
        exponential.mul_(_slope(x, scale, soft_cap))
        exponential.scatter_(1, column, torch.where(here[:, None], 0, exponential.gather(1, column)))
        logits.copy_(exponential)


def add_rescaled_reference(total: Tensor, product: Tensor, rescale: Tensor) -> None:
    """total = total · rescale + product, row by row; total is [rows, D], float32 (float64 for float64)."""
    total.mul_(rescale[:, None]).add_(product)


def logits_gradient_reference(
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
    """Replaces a block of products by their gradient.

    Args:
        logits: the block.
        first: the block's first column.
        targets: [rows], int64.
        logsumexp: [rows].
        dloss: [rows], gradient of each row's loss.
        scale: as in `linear_cross_entropy`.
        soft_cap: likewise; 0 for none.
        confidence: 1 - ε, what the smoothed target has at t.
        floor: ε/V, what it has everywhere.
    """
    x = capped(compute_dtype(logits), scale, soft_cap)
    dx = torch.exp(x - logsumexp[:, None]) - floor
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    dx = dx - confidence * (columns == targets[:, None]).to(x.dtype)
    logits.copy_(dloss[:, None] * dx * _slope(x, scale, soft_cap))


def head_statistics_reference(
    hidden: Tensor, targets: Tensor, weight: Tensor, soft_cap: float, scale: float
) -> OnlineState:
    """What `forward_pass` says of every row, argmax and all."""
    options = {"logit_sum": False, "argmax": True, "dhidden": False}
    return forward_pass(hidden, targets, weight, soft_cap, scale, **options)[0]


def _one_pass_refuses(
    device: str, dtype: torch.dtype, soft_cap: float | None = None, empty: bool = False
) -> str | None:
    """Of the kernel that makes its own products and rounds none of them."""
    if dtype != torch.bfloat16:
        return "in blocks of logits, as one pass takes bfloat16"
    if cpp.extension.isa() != "amx_bf16":
        return f"in blocks of logits, as {cpp.extension.isa()} kernels have no tiles for one pass"
    return "in blocks of logits, as one pass has no soft cap" if soft_cap or empty else None


def _cpp_head_statistics(hidden: Tensor, targets: Tensor, weight: Tensor, soft_cap: float, scale: float) -> OnlineState:
    """By csrc/token_scores.cpp."""
    hidden, weight, targets = cpp.contiguous_rows(hidden), cpp.contiguous_rows(weight), targets.contiguous()
    # Each of its own: an operation's outputs share no memory.
    maximum, total, target_logit = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    argmax = targets.new_zeros(len(targets))
    cpp.extension.token_scores(
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), targets.data_ptr(),
        maximum.data_ptr(), total.data_ptr(), target_logit.data_ptr(), argmax.data_ptr(),
        len(hidden), len(weight), weight.shape[1], scale, torch.get_num_threads(),
    )  # fmt: skip
    return OnlineState(maximum, total, target_logit, None, argmax)


def _cpp_online_softmax(
    logits: Tensor,
    first: int,
    targets: Tensor,
    state: OnlineState,
    rescale: Tensor,
    scale: float,
    soft_cap: float,
    exponentials: bool,
) -> None:
    cpp.extension.online_softmax(
        logits.data_ptr(), targets.data_ptr(), state.maximum.data_ptr(), state.total.data_ptr(),
        state.target_logit.data_ptr(), rescale.data_ptr(), cpp.address(state.logit_sum), cpp.address(state.argmax),
        len(logits), logits.shape[1], first, scale, soft_cap, exponentials,
        cpp.DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _cpp_add_rescaled(total: Tensor, product: Tensor, rescale: Tensor) -> None:
    cpp.extension.add_rescaled(
        total.data_ptr(), product.data_ptr(), rescale.data_ptr(), len(product), product.shape[1],
        cpp.DTYPES[product.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _cpp_logits_gradient(
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
    cpp.extension.logits_gradient(
        logits.data_ptr(), targets.data_ptr(), logsumexp.data_ptr(), dloss.data_ptr(),
        len(logits), logits.shape[1], first, scale, soft_cap, confidence, floor,
        cpp.DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


_TRITON = "cogsym.kernels.linear_cross_entropy"
ONLINE_SOFTMAX = Kernel(
    "online_softmax",
    online_softmax_reference,
    (backend.cpp(_cpp_online_softmax), backend.triton(f"{_TRITON}:online_softmax")),
)
ADD_RESCALED = Kernel(
    "add_rescaled",
    add_rescaled_reference,
    (backend.cpp(_cpp_add_rescaled), backend.triton(f"{_TRITON}:add_rescaled")),
)
LOGITS_GRADIENT = Kernel(
    "logits_gradient",
    logits_gradient_reference,
    (backend.cpp(_cpp_logits_gradient), backend.triton(f"{_TRITON}:logits_gradient")),
)
HEAD_STATISTICS = Kernel(
    "head_statistics",
    head_statistics_reference,
    (backend.cpp(_cpp_head_statistics, _one_pass_refuses),),
    facts=lambda hidden, targets, weight, soft_cap, scale: {"soft_cap": soft_cap, "empty": not len(hidden)},
    parts=(ONLINE_SOFTMAX,),
)


def forward_pass(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    soft_cap: float,
    scale: float,
    *,
    logit_sum: bool,
    argmax: bool,
    dhidden: bool,
) -> tuple[OnlineState, Tensor | None]:
    """The statistics of every row and, where wanted, the gradient of each row's loss for its hidden state."""
    N, V = len(hidden), len(weight)
    block_rows, block_columns = _block_size(hidden.device, hidden.shape[1])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    state = OnlineState(
        hidden.new_full((N,), -torch.inf, dtype=dtype),
        hidden.new_zeros(N, dtype=dtype),
        hidden.new_zeros(N, dtype=dtype),
        hidden.new_zeros(N, dtype=dtype) if logit_sum else None,
        targets.new_zeros(N) if argmax else None,
    )
    gradient = torch.empty_like(hidden) if dhidden else None
    buffer = hidden.new_empty(min(block_rows, N) * min(block_columns, V))
    softmax, add = ONLINE_SOFTMAX.implementation(hidden), ADD_RESCALED.implementation(hidden)
    for begin, end in row_pieces(N, hidden.device, hidden.shape[1]):
        h, t = hidden[begin:end], targets[begin:end]
        part = state.rows(begin, end)
        rescale = torch.empty_like(part.total)
        if gradient is not None:
            total = torch.zeros(h.shape, dtype=dtype, device=h.device)
            product = torch.empty_like(h, dtype=partial_dtype(h))
        for first in range(0, V, block_columns):
            w = weight[first : first + block_columns]
            logits = multiply_into(buffer[: len(h) * len(w)].view(len(h), len(w)), h, w, True)
            softmax(logits, first, t, part, rescale, scale, soft_cap, dhidden)
            if gradient is not None:
                add(total, multiply_into(product, logits, w, False), rescale)
        if gradient is not None:
            p = torch.exp(part.target_logit - capped(part.maximum, scale, soft_cap)) / part.total
            of_target = (p - 1) * _slope(part.target_logit, scale, soft_cap)
            total.div_(part.total[:, None]).addcmul_(weight[t].to(dtype), of_target[:, None])
            gradient[begin:end] = total
    return state, gradient


def backward_pass(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    logsumexp: Tensor,
    dloss: Tensor,
    soft_cap: float,
    scale: float,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dhidden of the rows, dweight), from logits computed again; None for one that is not needed."""
    N, V = len(hidden), len(weight)
    block_rows, block_columns = _block_size(hidden.device, hidden.shape[1])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_dhidden else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dweight else None
    buffer = hidden.new_empty(min(block_rows, N) * min(block_columns, V))
    partial = partial_dtype(hidden)
    product, one = torch.empty_like(hidden[:block_rows], dtype=partial), torch.ones_like(logsumexp)
    gradient, add = LOGITS_GRADIENT.implementation(hidden), ADD_RESCALED.implementation(hidden)
    # Rows inside columns: each block of dweight is then finished, and rounded, before the next is begun.
    for first in range(0, V, block_columns):
        w = weight[first : first + block_columns]
        if dweight is not None:
            dw = torch.zeros(w.shape, dtype=dtype, device=w.device)
        for begin, end in row_pieces(N, hidden.device, hidden.shape[1]):
            h, t = hidden[begin:end], targets[begin:end]
            logits = multiply_into(buffer[: len(h) * len(w)].view(len(h), len(w)), h, w, True)
            gradient(
                logits, first, t, logsumexp[begin:end], dloss[begin:end],
                scale, soft_cap, 1 - label_smoothing, label_smoothing / V,
            )  # fmt: skip
            if dhidden is not None:
                add(dhidden[begin:end], multiply_into(product[: len(h)], logits, w, False), one[begin:end])
            if dweight is not None:
                dw += torch.mm(logits.t(), h) if partial == h.dtype else torch.mm(logits.t(), h, out_dtype=partial)
        if dweight is not None:
            dweight[first : first + block_columns] = dw
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight


def scores_of_all(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, soft_cap: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(target_logit, logsumexp, argmax) of every row, without looking at which of them count."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]).contiguous(), targets.reshape(-1)
    known = (flat >= 0) & (flat < len(weight))
    state = head_statistics_reference(rows, torch.where(known, flat, 0), weight, soft_cap, scale)
    assert state.argmax is not None
    logit = torch.where(known, state.target_logit, torch.nan)
    found = (logit, 0), (state.logsumexp(scale, soft_cap), 0), (state.argmax, -1)
    ignored = flat == ignore_index
    target_logit, logsumexp, argmax = (torch.where(ignored, fill, x).view(targets.shape) for x, fill in found)
    return target_logit, logsumexp, argmax


def row_pieces(count: int, device: torch.device, D: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the rows of each block, of hidden states of D numbers.

    oneDNN's bfloat16 products of some 600 to 1,700 rows ran on half the cores where this was measured (2 cores with
    AMX: 1.2 instead of 2.3 TFLOP/s; 512 rows: 2.0), so on a CPU a piece is nearly whole or at most a quarter.
    """
    size, _ = _block_size(device, D)
    begin = 0
    while begin < count:
        rows = min(size, count - begin)
        if device.type == "cpu" and rows < 7 * size // 8:
            pieces = -(-rows // (size // 4))
            rows = -(-rows // pieces)
        yield begin, begin + rows
        begin += rows


def _block_size(device: torch.device, D: int) -> tuple[int, int]:
    return BLOCKS["cpu" if device.type == "cpu" else "cuda, narrow" if D <= NARROW else "cuda, wide"]
