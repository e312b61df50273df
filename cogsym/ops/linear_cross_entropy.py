"""The language-model head and its loss, without the logits: cross-entropy of c·tanh(scale · hidden·weightᵀ / c).

For one row h with target t, over a vocabulary of V:

    z_v = scale · h·w_v,   x_v = c·tanh(z_v / c)  (x = z without a soft cap),   lse = log Σ_v exp(x_v)
    loss = lse - (1 - ε)·x_t - ε/V · Σ_v x_v      (ε: label smoothing, as in torch.nn.functional.cross_entropy)
    dx_v = softmax(x)_v - (1 - ε)·[v = t] - ε/V,  dz_v = dx_v · (1 - tanh²(z_v / c)),  dh = scale · dz·W

Logits exist as blocks of a fixed size (`logit_blocks.BLOCKS`), which stay in cache. Each is a product by torch.mm,
rounded to the inputs' dtype as a model's logits are; all that is computed from it is float32 (float64 for float64). The
softmax goes online along the vocabulary (Milakov and Gimelshein, arXiv 1805.02867), and where only the hidden states
need a gradient, dh goes with it as the values of flash attention do (Dao et al., arXiv 2205.14135; a head is attention
of which the rows of W are both keys and values):

    dh = scale · (Σ_{v≠t} exp(x_v - max) · slope_v · w_v / Σ_v exp(x_v - max)  +  (p_t - 1) · slope_t · w_t)

so it is there when the loss is, for one product more and [N, D] kept until the backward pass scales its rows. The
target's term is apart because it nearly cancels the sum where the model is sure. Products of 2·N·D·V FLOPs:

    needs a gradient           forward   backward   kept for backward
    nothing                    1         –          nothing
    hidden                     2         –          dh [N, D]
    weight                     1         2          hidden, lse
    both                       1         3          hidden, lse
    hidden, label smoothing    1         2          hidden, lse

A trained weight recomputes the logits: its gradient needs each row's lse, and then each block of it is one product over
all rows, rounded once, where chunks of rows would pass over a float32 [V, D] for each chunk. Rows whose target is
ignored are left out of everything.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import logit_blocks
from cogsym.ops.checks import check_floating, check_like, check_rows, check_shape
from cogsym.ops.counted_rows import counted
from cogsym.ops.linear import linear_reference
from cogsym.ops.operation import Example, Operation, Sizes, register_operation

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


class TokenScores(NamedTuple):
    """What the head says of each target; all of the targets' broadcast shape."""

    target_logit: Tensor  # float32 (float64 for float64); 0 where the target is ignored
    logsumexp: Tensor  # like target_logit
    argmax: Tensor  # int64, the smallest of equals; -1 where the target is ignored
    loss: Tensor  # logsumexp - target_logit


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of targets under the logits scale · hidden·weightᵀ, soft-capped.

    transformers' causal language-model loss is this with the labels shifted by one; with its `num_items_in_batch`, it
    is `reduction="sum"` divided by that number.

    Args:
        hidden: [..., D], floating point; several sets of states may share targets along leading dimensions.
        weight: [V, D]. Under torch.autocast, hidden and weight are cast as torch.nn.functional.linear casts them;
            otherwise their dtypes are the same, or the weight's is one that hidden's holds exactly.
        targets: [...], int64, broadcast to the shape of hidden without its D.
        ignore_index: a target that counts for nothing.
        soft_cap: c of the soft cap, or None.
        scale: of the products, > 0 (Granite divides by `logits_scaling`: its inverse).
        label_smoothing: in [0, 1].
        token_weights: [...], floating point, broadcast like targets; each token's factor in the loss.
        reduction: "none" gives each token's loss, 0 where ignored; "sum" their sum; "mean" the sum divided by the
            number of targets that are not ignored, or by the sum of their token weights. Without any, that is NaN, as
            in PyTorch, and the gradients are 0.

    Returns:
        float32 (float64 for float64): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes or dtypes that do not fit, or an option out of range.
        TypeError: hidden and weight are not floating point.
        IndexError: a target outside [0, V) that is not ignore_index.
        RuntimeError: tensors on different devices; or, in the backward pass, a second derivative is asked for.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1.")
    hidden, weight, targets = _prepared("linear_cross_entropy", hidden, weight, targets, soft_cap, scale)
    if token_weights is not None:
        _check_broadcasts("linear_cross_entropy: token_weights", token_weights, targets.shape)
    # What the backward pass will be asked for, which decides what the forward pass computes.
    grad = torch.is_grad_enabled()
    at_once = grad and hidden.requires_grad and not weight.requires_grad and label_smoothing == 0.0
    loss, *_ = _linear_cross_entropy(
        hidden, weight, targets, ignore_index, soft_cap or 0.0, scale, label_smoothing, at_once
    )
    counts = (targets != ignore_index).to(loss.dtype)
    if token_weights is not None:
        counts = torch.where(targets != ignore_index, token_weights.to(loss.dtype), 0)
        loss = loss * counts
    if reduction == "none":
        return loss
    return loss.sum() / counts.sum() if reduction == "mean" else loss.sum()


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    scale: float = 1.0,
) -> TokenScores:
    """What `linear_cross_entropy` is made of, for each token and without gradients; arguments as there. A GPU is not
    waited for: there a target outside [0, V) that is not `ignore_index` has NaN for its logit and loss."""
    hidden, weight, targets = _prepared("token_scores", hidden, weight, targets, soft_cap, scale)
    target_logit, logsumexp, argmax = _token_scores(hidden, weight, targets, ignore_index, soft_cap or 0.0, scale)
    return TokenScores(target_logit, logsumexp, argmax, logsumexp - target_logit)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    soft_cap: float,
    scale: float,
    label_smoothing: float,
) -> Tensor:
    """Each token's loss in plain PyTorch, with all logits at once; `soft_cap` 0 is none."""
    logits = logit_blocks.capped(logit_blocks.compute_dtype(linear_reference(hidden, weight, None)), scale, soft_cap)
    targets = targets.expand(hidden.shape[:-1])
    return F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(targets.shape)


def _prepared(
    name: str, hidden: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight as autocast wants them, and targets of hidden's shape; options are checked."""
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{name}: soft_cap is {soft_cap}, expected a number above 0, or None.")
    if not scale > 0:
        raise ValueError(f"{name}: scale is {scale}, expected a number above 0.")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
    _check_broadcasts(f"{name}: targets", targets, hidden.shape[:-1])
    return hidden, weight, targets.expand(hidden.shape[:-1])


def _check_broadcasts(name: str, x: Tensor, shape: torch.Size) -> None:
    fits = all(t in (1, s) for t, s in zip(reversed(x.shape), reversed(shape), strict=False))
    if x.dim() > len(shape) or not fits:
        raise ValueError(f"{name} have shape {tuple(x.shape)}, expected one that broadcasts to {tuple(shape)}.")


def _check(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, *_: Any) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected [..., D] and [V, D]."
        )
    _check_targets(name, targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: targets have shape {tuple(targets.shape)}, expected {tuple(hidden.shape[:-1])}.")
    if hidden.dtype != weight.dtype and torch.promote_types(hidden.dtype, weight.dtype) != hidden.dtype:
        raise ValueError(
            f"{name}: hidden is {hidden.dtype} and weight {weight.dtype}, expected the same dtype or a narrower one."
        )
    check_floating(name, "weight", weight)


def _check_targets(name: str, targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ValueError(f"{name}: targets are {targets.dtype}, expected torch.int64.")


def _check_backward(dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, logsumexp: Tensor, *_: Any) -> None:
    _check("linear_cross_entropy", hidden, weight, targets)
    check_shape("linear_cross_entropy", "logsumexp", logsumexp, "targets", targets)
    check_like("linear_cross_entropy", "logsumexp", logsumexp, ("dloss", dloss))


def _check_scale(dhidden: Tensor, dloss: Tensor, targets: Tensor, *_: Any) -> None:
    check_rows("linear_cross_entropy", "dhidden", dhidden)
    check_floating("linear_cross_entropy", "dloss", dloss)
    _check_targets("linear_cross_entropy", targets)
    check_shape("linear_cross_entropy", "targets", targets, "dhidden's rows", dhidden[..., 0])
    check_shape("linear_cross_entropy", "dloss", dloss, "targets", targets)


def _linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    soft_cap: float,
    scale: float,
    label_smoothing: float,
    at_once: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp, dhidden): dhidden is each row's for a gradient of 1, empty unless `at_once`."""
    rows = counted(hidden, targets, ignore_index, len(weight))
    smoothed = label_smoothing != 0.0
    state, dhidden = logit_blocks.forward_pass(
        rows.hidden, rows.targets, weight, soft_cap, scale, logit_sum=smoothed, argmax=False, dhidden=at_once
    )
    logsumexp = state.logsumexp(scale, soft_cap)
    loss = logsumexp - (1 - label_smoothing) * state.target_logit
    if state.logit_sum is not None:
        loss -= label_smoothing / len(weight) * state.logit_sum
    return (
        rows.spread(loss, 0, targets.shape),
        rows.spread(logsumexp, 0, targets.shape),
        hidden.new_empty(0) if dhidden is None else rows.spread(dhidden, 0, hidden.shape),
    )


def _linear_cross_entropy_backward_reference(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    ignore_index: int,
    soft_cap: float,
    scale: float,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight), an empty tensor for one that is not needed."""
    rows = counted(hidden, targets, ignore_index, len(weight))
    dloss, logsumexp = (
        t.reshape(-1) if rows.places is None else t.reshape(-1)[rows.places] for t in (dloss, logsumexp)
    )
    dhidden, dweight = logit_blocks.backward_pass(
        rows.hidden,
        rows.targets,
        weight,
        logsumexp,
        dloss.contiguous(),
        soft_cap,
        scale,
        label_smoothing,
        need_dhidden,
        need_dweight,
    )
    return (
        hidden.new_empty(0) if dhidden is None else rows.spread(dhidden, 0, hidden.shape),
        weight.new_empty(0) if dweight is None else dweight,
    )


def _linear_cross_entropy_scale_reference(dhidden: Tensor, dloss: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """dhidden · dloss row by row, rounded once. Rows that do not count stay 0, even times infinity: a mean of none."""
    dloss = torch.where(targets == ignore_index, 0, dloss)
    return torch.mul(dhidden, dloss.unsqueeze(-1), out=torch.empty_like(dhidden))


def _token_scores_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, soft_cap: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(target_logit, logsumexp, argmax)."""
    if hidden.is_cuda:
        return logit_blocks.scores_of_all(hidden, weight, targets, ignore_index, soft_cap, scale)
    rows = counted(hidden, targets, ignore_index, len(weight))
    arguments = rows.hidden, rows.targets, weight, soft_cap, scale
    state = logit_blocks.HEAD_STATISTICS.implementation(*arguments)(*arguments)
    return (
        rows.spread(state.target_logit, 0, targets.shape),
        rows.spread(state.logsumexp(scale, soft_cap), 0, targets.shape),
        rows.spread(state.argmax, -1, targets.shape),
    )


def _statistic(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:-1], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _like(x: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)


# Products of all rows: which targets are ignored is not known from shapes.
def _forward_flops(hidden: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any) -> int:
    at_once = len(rest) == 6 and rest[-1]
    return 2 * math.prod(hidden) * weight[0] * (2 if at_once else 1)


def _backward_flops(dloss: Any, hidden: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any) -> int:
    return 2 * math.prod(hidden) * weight[0] * (1 + rest[-2] + rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, *ctx.options, ctx.at_once = inputs
    _, logsumexp, dhidden = output
    ctx.mark_non_differentiable(logsumexp, dhidden)
    ctx.save_for_backward(*((dhidden, targets) if ctx.at_once else (hidden, weight, targets, logsumexp)))


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: a dhidden that was computed before would pass for a constant
        raise RuntimeError("linear_cross_entropy has no second derivative; compute its gradient without create_graph.")
    need_dhidden, need_dweight = ctx.needs_input_grad[:2]
    dhidden, dweight = None, None
    if ctx.at_once:
        kept, targets = ctx.saved_tensors
        dhidden = _linear_cross_entropy_scale(kept, dloss, targets, ctx.options[0])
    else:
        dhidden, dweight = _linear_cross_entropy_backward(
            dloss, *ctx.saved_tensors, *ctx.options, need_dhidden, need_dweight
        )
    return dhidden if need_dhidden else None, dweight if need_dweight else None, *[None] * 6


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """The loss of a frozen head, as a model takes it, and the gradient for its hidden states."""
    N, D, V = sizes.rows * sizes.length, sizes.width, sizes.vocabulary
    hidden, weight = (torch.randn(rows, D, device=device).to(dtype) for rows in (N, V))
    targets = torch.randint(V, (N,), device=device)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (linear_cross_entropy(hidden, weight, targets),)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(logit_blocks.compute_dtype(F.linear(hidden, weight)), targets),)

    product = 2 * N * D * V
    inputs = {"hidden": hidden, "weight": weight / D**0.5, "targets": targets}
    # The gradient is there when the loss is, so a backward pass alone says nothing.
    return Example(inputs, ours, plain, ("hidden",), "FLOP", {"forward": product, "both": 2 * product})


_linear_cross_entropy = register_operation(
    Operation(
        "linear_cross_entropy",
        _linear_cross_entropy_reference,
        check=partial(_check, "linear_cross_entropy"),
        parts=(logit_blocks.ONLINE_SOFTMAX, logit_blocks.ADD_RESCALED, logit_blocks.LOGITS_GRADIENT),
        fake=lambda hidden, *rest: (_statistic(hidden), _statistic(hidden), _like(hidden, rest[-1])),
        autograd=(_setup, _backward),
        flops=_forward_flops,
        example=_example,
    )
)
_linear_cross_entropy_backward = register_operation(
    Operation(
        "linear_cross_entropy_backward",
        _linear_cross_entropy_backward_reference,
        check=_check_backward,
        parts=(logit_blocks.LOGITS_GRADIENT, logit_blocks.ADD_RESCALED),
        fake=lambda dloss, hidden, weight, *rest: (_like(hidden, rest[-2]), _like(weight, rest[-1])),
        flops=_backward_flops,
        part_of="linear_cross_entropy",
    )
)
_linear_cross_entropy_scale = register_operation(
    Operation(
        "linear_cross_entropy_scale",
        _linear_cross_entropy_scale_reference,
        check=_check_scale,
        fake=lambda dhidden, *_: torch.empty_like(dhidden),
        part_of="linear_cross_entropy",
    )
)
_token_scores = register_operation(
    Operation(
        "token_scores",
        _token_scores_reference,
        check=partial(_check, "token_scores"),
        parts=(logit_blocks.HEAD_STATISTICS,),
        fake=lambda hidden, weight, targets, *_: (_statistic(hidden), _statistic(hidden), _like(targets, True)),
        flops=_forward_flops,
    )
)
