"""Layer normalisation, with the residual addition that precedes it in a decoder block.

    h = x + residual                  (h = x without a residual)
    m = mean(h),  r = (mean((h - m)²) + eps)^(-1/2)     over the last dimension, scalars a row
    y = (h - m) · r · (offset + γ) + β                  (β = 0 without a bias)

Source: Ba et al., "Layer Normalization", arXiv 1607.06450. Cohere has no bias; Nemotron's LayerNorm1P stores γ - 1 and
has offset 1.

With g = dy · (offset + γ) and n = (h - m) · r, the gradients are

    dh = r · (g - mean(g) - n · mean(g · n))   (+ the gradient that reaches h itself)
    dγ = Σ_rows dy · n,  dβ = Σ_rows dy

Only h is kept for the backward pass; m and r are recomputed from it. Everything is computed in float32 (float64 for
float64) and rounded once.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, cpp
from cogsym.ops.checks import check_floating, check_like, check_rows, check_shape
from cogsym.ops.operation import Example, Operation, Sizes, register_operation


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, residual: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise rows of `x`, after adding `residual` where one is given.

    Args:
        x: [..., D], floating point.
        weight: γ, [D], any floating-point dtype.
        bias: β, [D], dtype of the weight; None is 0.
        eps: added to the variance.
        residual: [..., D], the residual stream; where dtypes differ the sum has PyTorch's promoted dtype.
        offset: added to γ; 1.0 for Nemotron.

    Returns:
        y, [..., D] in the dtype of h; with `residual` the pair (y, h).

    Raises:
        ValueError: shapes that do not fit, or a bias whose dtype is not the weight's.
        TypeError: x or weight is not floating point.
        RuntimeError: tensors on different devices.
    """
    if residual is None:
        return _layer_norm(x, weight, bias, eps, offset)
    if residual.dtype == x.dtype:
        return _add_layer_norm(x, residual, weight, bias, eps, offset)
    check_shape("layer_norm", "residual", residual, "x", x)  # the sum would broadcast
    h = x + residual
    return _layer_norm(h, weight, bias, eps, offset), h


def layer_norm_input_gradient(
    dy: Tensor, h: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, dh: Tensor | None = None
) -> Tensor:
    """The gradient for h, [..., D], of a `layer_norm` whose gradient is not left to autograd.

    Args:
        dy: the gradient of y, [..., D].
        h: what was normalised.
        weight: as in `layer_norm`.
        eps: likewise.
        offset: likewise.
        dh: the gradient that reaches h by the residual stream; added in the same pass.

    Raises:
        ValueError, TypeError, RuntimeError: as `layer_norm`; dy and dh are like h.
    """
    return _layer_norm_backward(dy, h, weight, eps, offset, dh, True, False, False)[0]


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    """`layer_norm` in plain PyTorch; the documentation of what the kernels compute."""
    n, _ = _normalised(_compute_dtype(x), eps)
    y = n * (offset + weight.to(n.dtype))
    return (y if bias is None else y + bias.to(n.dtype)).to(x.dtype).contiguous()


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + residual: (y, h). The norm sees h as it is stored, so y belongs to the h returned."""
    h = (x + residual).contiguous()
    return layer_norm_reference(h, weight, bias, eps, offset), h


def layer_norm_backward_reference(
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
    """Gradients of `layer_norm`: (dx, dweight, dbias), an empty tensor for one that is not needed.

    Args:
        dy: [..., D], gradient of y.
        h: [..., D], what was normalised.
        weight: [D].
        eps: as in the forward pass.
        offset: as in the forward pass.
        dh: [..., D], gradient that reaches h along the residual stream; added to dx.
        need_dx: whether dx is wanted (it is the gradient of x and of the residual alike).
        need_dweight: whether dweight is wanted.
        need_dbias: whether dbias is wanted.
    """
    g = _compute_dtype(dy)
    n, r = _normalised(_compute_dtype(h), eps)
    dx, dweight, dbias = h.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_dweight:
        dweight = (g * n).reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
    if need_dbias:
        dbias = g.reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
    if need_dx:
        g = g * (offset + weight.to(g.dtype))
        total = r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
        dx = (total if dh is None else total + dh).to(h.dtype).contiguous()
    return dx, dweight, dbias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> None:
    check_rows("layer_norm", "x", x)
    if not weight.dtype.is_floating_point:
        check_floating("layer_norm", "weight", weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"layer_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},) to match x.")
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise ValueError(
            f"layer_norm: bias is {tuple(bias.shape)} {bias.dtype}, expected {tuple(weight.shape)} {weight.dtype} to "
            "match weight."
        )


def _check_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> None:
    check_like("layer_norm", "x", x, ("residual", residual))
    _check(x, weight, bias)


def _check_backward(
    dy: Tensor, h: Tensor, weight: Tensor, eps: float, offset: float, dh: Tensor | None, *_: Any
) -> None:
    check_like("layer_norm", "h", h, ("dy", dy), ("dh", dh))
    _check(h, weight, None)


def _compute_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalised(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(n, r)."""
    centred = h - h.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * r, r


def _cpp(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    return _cpp_forward(x, None, weight, bias, eps, offset)[0]


def _cpp_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    return _cpp_forward(x, residual, weight, bias, eps, offset)


def _cpp_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """By csrc/layer_norm.cpp: (y, h), h being x without a residual."""
    y = cpp.empty_like(x)
    h = x if residual is None else cpp.empty_like(x)
    if x.numel():
        rows, weight = cpp.rows(x), cpp.table(weight)
        stream = rows if residual is None else cpp.rows(residual)
        bias = None if bias is None else cpp.table(bias)
        cpp.extension.layer_norm(
            rows.data_ptr(), rows.stride(0), 0 if residual is None else stream.data_ptr(), stream.stride(0),
            weight.data_ptr(), cpp.address(bias), y.data_ptr(), h.data_ptr(), len(rows), rows.shape[1], eps, offset,
            cpp.DTYPES[x.dtype], cpp.DTYPES[weight.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y, h


def _cpp_backward(
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
    """By csrc/layer_norm.cpp."""
    table = cpp.table(weight)
    dx = cpp.empty_like(h) if need_dx else h.new_empty(0)
    empty = torch.empty_like if h.numel() else torch.zeros_like
    dweight, dbias = (empty(table) if need else table.new_empty(0) for need in (need_dweight, need_dbias))
    if h.numel():
        rows, grad = cpp.rows(h), cpp.rows(dy)
        stream = grad if dh is None else cpp.rows(dh)
        cpp.extension.layer_norm_backward(
            grad.data_ptr(), grad.stride(0), rows.data_ptr(), rows.stride(0),
            0 if dh is None else stream.data_ptr(), stream.stride(0), table.data_ptr(),
            dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0,
            dbias.data_ptr() if need_dbias else 0, len(rows), rows.shape[1], eps, offset,
            cpp.DTYPES[h.dtype], cpp.DTYPES[table.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _fake_add(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y)


def _fake_backward(dy: Tensor, h: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dweight, need_dbias = rest[-3:]
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dx else h.new_empty(0)
    dweight, dbias = (torch.empty_like(weight) if need else weight.new_empty(0) for need in (need_dweight, need_dbias))
    return dx, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    grads = _layer_norm_backward(dy, h, weight, ctx.eps, ctx.offset, None, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def _backward_add(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    need_x, need_residual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
    if dy is None:  # only the residual stream was used further on
        zeros = torch.zeros_like(weight)
        dx, dweight, dbias = dh, zeros, zeros.clone()
    else:
        needed = need_x or need_residual, need_dweight, need_dbias
        dx, dweight, dbias = _layer_norm_backward(dy, h, weight, ctx.eps, ctx.offset, dh, *needed)
    return (
        dx if need_x else None,
        dx if need_residual else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        None,
        None,
    )


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Without a bias, as Cohere has it, and with the residual addition before it."""
    shape = (sizes.rows, sizes.length, sizes.width)
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(sizes.width, device=device).to(dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return layer_norm(x, weight, None, 1e-5, residual=residual)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        h = x + residual
        return F.layer_norm(h, weight.shape, weight, None, 1e-5), h

    size = 4 * x.numel() * x.element_size()
    inputs = {"x": x, "residual": residual, "weight": weight}
    return Example(inputs, ours, plain, ("x",), "B", {"forward": size, "backward": size})


_layer_norm = register_operation(
    Operation(
        "layer_norm",
        layer_norm_reference,
        check=_check,
        backends=(backend.cpp(_cpp), backend.triton("cogsym.kernels.layer_norm:layer_norm")),
        fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        autograd=(_setup, _backward),
        example=_example,
    )
)
_add_layer_norm = register_operation(
    Operation(
        "add_layer_norm",
        add_layer_norm_reference,
        check=_check_add,
        backends=(backend.cpp(_cpp_add), backend.triton("cogsym.kernels.layer_norm:add_layer_norm")),
        fake=_fake_add,
        autograd=(_setup_add, _backward_add),
        part_of="layer_norm",
    )
)
_layer_norm_backward = register_operation(
    Operation(
        "layer_norm_backward",
        layer_norm_backward_reference,
        check=_check_backward,
        backends=(backend.cpp(_cpp_backward), backend.triton("cogsym.kernels.layer_norm:layer_norm_backward")),
        fake=_fake_backward,
        part_of="layer_norm",
    )
)
