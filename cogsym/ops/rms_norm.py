"""Root-mean-square layer normalisation, with the residual addition that precedes it in a decoder block.

    h = x + residual              (h = x without a residual)
    r = (mean(h²) + eps)^(-1/2)   over the last dimension, a scalar a row
    y = h · r · (offset + γ)

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467. Llama, Mistral and Qwen have
offset 0, Gemma offset 1 (it stores γ - 1).

With g = dy · (offset + γ), the gradients are

    dh = r · g - h · r³ · mean(g · h)  (+ the gradient that reaches h itself)
    dγ = Σ_rows dy · h · r

Only h is kept for the backward pass, and it is the tensor that the residual stream holds anyway; r is recomputed from
it, one pass over a row that must be read in any case. Everything is computed in float32 (float64 for float64) and
rounded once; transformers rounds twice, after the scaling by r and after γ.
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
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise rows of `x`, after adding `residual` where one is given.

    Args:
        x: [..., D], floating point.
        weight: γ, [D], any floating-point dtype.
        eps: added to the mean square.
        residual: [..., D], the residual stream; where dtypes differ the sum has PyTorch's promoted dtype.
        offset: added to γ; 1.0 for Gemma.

    Returns:
        y, [..., D] in the dtype of h; with `residual` the pair (y, h).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: x or weight is not floating point.
        RuntimeError: tensors on different devices.
    """
    if residual is None:
        return _rms_norm(x, weight, eps, offset)
    if residual.dtype == x.dtype:
        return _add_rms_norm(x, residual, weight, eps, offset)
    check_shape("rms_norm", "residual", residual, "x", x)  # the sum would broadcast
    h = x + residual
    return _rms_norm(h, weight, eps, offset), h


def rms_norm_input_gradient(
    dy: Tensor, h: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, dh: Tensor | None = None
) -> Tensor:
    """The gradient for h, [..., D], of a `rms_norm` whose gradient is not left to autograd.

    Args:
        dy: the gradient of y, [..., D].
        h: what was normalised.
        weight, eps, offset: as in `rms_norm`.
        dh: the gradient that reaches h by the residual stream; added in the same pass.

    Raises:
        ValueError, TypeError, RuntimeError: as `rms_norm`; dy and dh are like h.
    """
    return _rms_norm_backward(dy, h, weight, eps, offset, dh, True, False)[0]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """`rms_norm` in plain PyTorch; the documentation of what the kernels compute."""
    h = _compute_dtype(x)
    y = h * _inverse_rms(h, eps) * (offset + weight.to(h.dtype))
    return y.to(x.dtype).contiguous()


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual: (y, h). The norm sees h as it is stored, so y belongs to the h returned."""
    h = (x + residual).contiguous()
    return rms_norm_reference(h, weight, eps, offset), h


def rms_norm_backward_reference(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    dh: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`: (dx, dweight), an empty tensor for one that is not needed.

    Args:
        dy: [..., D], gradient of y.
        h: [..., D], what was normalised.
        weight: [D].
        eps: as in the forward pass.
        offset: as in the forward pass.
        dh: [..., D], gradient that reaches h along the residual stream; added to dx.
        need_dx: whether dx is wanted (it is the gradient of x and of the residual alike).
        need_dweight: whether dweight is wanted.
    """
    g, x = _compute_dtype(dy), _compute_dtype(h)
    r = _inverse_rms(x, eps)
    dx, dweight = h.new_empty(0), weight.new_empty(0)
    if need_dweight:
        dweight = (g * x * r).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if need_dx:
        g = g * (offset + weight.to(g.dtype))
        total = r * (g - x * r.square() * (g * x).mean(-1, keepdim=True))
        dx = (total if dh is None else total + dh).to(h.dtype).contiguous()
    return dx, dweight


def _check(x: Tensor, weight: Tensor, *_: Any) -> None:
    check_rows("rms_norm", "x", x)
    if not weight.dtype.is_floating_point:
        check_floating("rms_norm", "weight", weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},) to match x.")


def _check_add(x: Tensor, residual: Tensor, weight: Tensor, *_: Any) -> None:
    check_like("rms_norm", "x", x, ("residual", residual))
    _check(x, weight)


def _check_backward(
    dy: Tensor, h: Tensor, weight: Tensor, eps: float, offset: float, dh: Tensor | None, *_: Any
) -> None:
    check_like("rms_norm", "h", h, ("dy", dy), ("dh", dh))
    _check(h, weight)


def _compute_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _cpp(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return _cpp_forward(x, None, weight, eps, offset)[0]


def _cpp_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _cpp_forward(x, residual, weight, eps, offset)


def _cpp_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """By csrc/rms_norm.cpp: (y, h), h being x without a residual."""
    y = cpp.empty_like(x)
    h = x if residual is None else cpp.empty_like(x)
    if x.numel():
        rows, weight = cpp.rows(x), cpp.table(weight)
        stream = rows if residual is None else cpp.rows(residual)
        cpp.extension.rms_norm(
            rows.data_ptr(), rows.stride(0), 0 if residual is None else stream.data_ptr(), stream.stride(0),
            weight.data_ptr(), y.data_ptr(), h.data_ptr(), len(rows), rows.shape[1], eps, offset,
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
) -> tuple[Tensor, Tensor]:
    """By csrc/rms_norm.cpp."""
    dx = cpp.empty_like(h) if need_dx else h.new_empty(0)
    if not h.numel():
        return dx, torch.zeros_like(weight) if need_dweight else weight.new_empty(0)
    table = cpp.table(weight)
    dweight = torch.empty_like(table) if need_dweight else table.new_empty(0)
    rows, grad = cpp.rows(h), cpp.rows(dy)
    stream = grad if dh is None else cpp.rows(dh)
    cpp.extension.rms_norm_backward(
        grad.data_ptr(), grad.stride(0), rows.data_ptr(), rows.stride(0),
        0 if dh is None else stream.data_ptr(), stream.stride(0), table.data_ptr(),
        dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0,
        len(rows), rows.shape[1], eps, offset, cpp.DTYPES[h.dtype], cpp.DTYPES[table.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight.to(weight.dtype)


def _fake_add(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y)


def _fake_backward(dy: Tensor, h: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_dx, need_dweight = rest[-2:]
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if need_dx else h.new_empty(0)
    return dx, torch.empty_like(weight) if need_dweight else weight.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.eps, ctx.offset = inputs[3:]
    ctx.save_for_backward(output[1], inputs[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _rms_norm_backward(dy, h, weight, ctx.eps, ctx.offset, None, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None, None


def _backward_add(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    need_x, need_residual, need_dweight = ctx.needs_input_grad[:3]
    if dy is None:  # only the residual stream was used further on
        dx, dweight = dh, torch.zeros_like(weight) if need_dweight else None
    else:
        need_dx = need_x or need_residual
        dx, dweight = _rms_norm_backward(dy, h, weight, ctx.eps, ctx.offset, dh, need_dx, need_dweight)
    return (
        dx if need_x else None,
        dx if need_residual else None,
        dweight if need_dweight else None,
        None,
        None,
    )


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """With the residual addition before it, as a block has it."""
    shape = (sizes.rows, sizes.length, sizes.width)
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(sizes.width, device=device).to(dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return rms_norm(x, weight, 1e-5, residual=residual)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        h = x + residual
        return F.rms_norm(h, weight.shape, weight, 1e-5), h

    size = 4 * x.numel() * x.element_size()
    inputs = {"x": x, "residual": residual, "weight": weight}
    return Example(inputs, ours, plain, ("x",), "B", {"forward": size, "backward": size})


_rms_norm = register_operation(
    Operation(
        "rms_norm",
        rms_norm_reference,
        check=_check,
        backends=(backend.cpp(_cpp), backend.triton("cogsym.kernels.rms_norm:rms_norm")),
        fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        autograd=(_setup, _backward),
        example=_example,
    )
)
_add_rms_norm = register_operation(
    Operation(
        "add_rms_norm",
        add_rms_norm_reference,
        check=_check_add,
        backends=(backend.cpp(_cpp_add), backend.triton("cogsym.kernels.rms_norm:add_rms_norm")),
        fake=_fake_add,
        autograd=(_setup_add, _backward_add),
        part_of="rms_norm",
    )
)
_rms_norm_backward = register_operation(
    Operation(
        "rms_norm_backward",
        rms_norm_backward_reference,
        check=_check_backward,
        backends=(backend.cpp(_cpp_backward), backend.triton("cogsym.kernels.rms_norm:rms_norm_backward")),
        fake=_fake_backward,
        part_of="rms_norm",
    )
)
