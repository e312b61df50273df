"""The activation of Apertus, xIELU, with two trained numbers.

    y = α_p · x² + β · x                                 for x > 0
    y = α_n · (e^min(x, eps) - 1 - x) + β · x            elsewhere, eps < 0 and near 0

Source: Huang, "Deriving Activation Functions Using Integration", arXiv 2411.13010. α_p and α_n are what the formula
multiplies by: the softplus that keeps them positive is the caller's, and autograd's.

    dx = dz · (2 · α_p · x + β)                          for x > 0
    dx = dz · (α_n · (e^x - 1) + β)                      for x < eps;  dz · (β - α_n) between eps and 0
    dα_p = Σ_(x > 0) dz · x²,  dα_n = Σ_(x <= 0) dz · (e^min(x, eps) - 1 - x)

x is kept for the backward pass, nothing else. Everything is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogsym.ops import backend, cpp
from cogsym.ops.checks import check_floating, check_like, check_rows
from cogsym.ops.operation import Example, Operation, Sizes, register_operation


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """y, for every element of x.

    Args:
        x: [..., F], floating point; rows may be strided.
        alpha_p: α_p, one element of any shape, floating point.
        alpha_n: α_n, like `alpha_p`.
        beta: β; 0.5 in Apertus.
        eps: upper bound of the exponent; -1e-6 in Apertus.

    Returns:
        [..., F], contiguous, dtype of x.

    Raises:
        ValueError: alpha_p or alpha_n does not have one element.
        TypeError: x, alpha_p or alpha_n is not floating point.
        RuntimeError: tensors on different devices.
    """
    return _xielu(x, alpha_p, alpha_n, beta, eps)


def xielu_input_gradient(dz: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """dx, [..., F], of a `xielu` whose gradient is not left to autograd; dz is like x."""
    return _xielu_backward(dz, x, alpha_p, alpha_n, beta, eps, True, False)[0]


def xielu_reference(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """`xielu` in plain PyTorch."""
    h = _compute_dtype(x)
    positive, negative = (alpha.to(h.dtype).view(()) for alpha in (alpha_p, alpha_n))
    y = torch.where(h > 0, positive * h.square(), negative * _bend(h, eps)) + beta * h
    return y.to(x.dtype).contiguous()


def xielu_backward_reference(
    dz: Tensor,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float,
    eps: float,
    need_dx: bool,
    need_dalphas: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `xielu`: (dx, [dα_p, dα_n]), an empty tensor for one that is not needed; those of the α are float32
    (float64 for float64)."""
    d, h = _compute_dtype(dz), _compute_dtype(x)
    dx, dalphas = x.new_empty(0), h.new_empty(0)
    if need_dx:
        positive, negative = (alpha.to(h.dtype).view(()) for alpha in (alpha_p, alpha_n))
        exponential = torch.where(h >= eps, -1, torch.expm1(h.clamp(max=eps)))
        dx = d * (torch.where(h > 0, 2 * positive * h, negative * exponential) + beta)
        dx = dx.to(x.dtype).contiguous()
    if need_dalphas:
        # Each is one sum over all elements, most of which cancels; only Apple's GPUs have no float64.
        wide = h.dtype if h.device.type == "mps" else torch.float64
        d, z = d.to(wide), h.to(wide)
        above = torch.where(z > 0, d * z.square(), 0).sum()
        dalphas = torch.stack((above, torch.where(z > 0, 0, d * _bend(z, eps)).sum())).to(h.dtype)
    return dx, dalphas


def _check(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *_: Any) -> None:
    check_rows("xielu", "x", x)
    for name, alpha in (("alpha_p", alpha_p), ("alpha_n", alpha_n)):
        if alpha.numel() != 1:
            raise ValueError(f"xielu: {name} has shape {tuple(alpha.shape)}, expected one element.")
        if not alpha.dtype.is_floating_point:
            check_floating("xielu", name, alpha)


def _check_backward(dz: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *_: Any) -> None:
    check_like("xielu", "x", x, ("dz", dz))
    _check(x, alpha_p, alpha_n)


def _compute_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bend(x: Tensor, eps: float) -> Tensor:
    """e^min(x, eps) - 1 - x."""
    return torch.expm1(x.clamp(max=eps)) - x


def _cpp(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """By csrc/xielu.cpp."""
    y = cpp.empty_like(x)
    if x.numel():
        rows = cpp.rows(x)
        cpp.extension.xielu(
            rows.data_ptr(), rows.stride(0), y.data_ptr(), len(rows), rows.shape[1],
            alpha_p.item(), alpha_n.item(), beta, eps, cpp.DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y


def _cpp_backward(
    dz: Tensor,
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float,
    eps: float,
    need_dx: bool,
    need_dalphas: bool,
) -> tuple[Tensor, Tensor]:
    """By csrc/xielu.cpp."""
    dx, dalphas = _fake_backward(dz, x, need_dx, need_dalphas)
    if not x.numel():
        return dx, dalphas.zero_()
    rows, grad = cpp.rows(x), cpp.rows(dz)
    cpp.extension.xielu_backward(
        grad.data_ptr(), grad.stride(0), rows.data_ptr(), rows.stride(0), dx.data_ptr() if need_dx else 0,
        dalphas.data_ptr() if need_dalphas else 0, len(rows), rows.shape[1], alpha_p.item(), alpha_n.item(), beta, eps,
        cpp.DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dalphas


def _fake_backward(dz: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_dx, need_dalphas = rest[-2:]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    return dx, x.new_empty(2 * need_dalphas, dtype=torch.promote_types(x.dtype, torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, alpha_p, alpha_n, ctx.beta, ctx.eps = inputs
    ctx.save_for_backward(x, alpha_p, alpha_n)


def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    x, *alphas = ctx.saved_tensors
    need_dx, *need_dalphas = ctx.needs_input_grad[:3]
    dx, dalphas = _xielu_backward(dz, x, *alphas, ctx.beta, ctx.eps, need_dx, any(need_dalphas))
    of_alphas = (
        dalphas[i].to(alpha.dtype).view(alpha.shape) if need else None
        for i, (alpha, need) in enumerate(zip(alphas, need_dalphas, strict=True))
    )
    return dx if need_dx else None, *of_alphas, None, None


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Behind the up projection, with Apertus's own numbers."""
    x = torch.randn(sizes.rows, sizes.length, sizes.mlp_width, device=device).to(dtype)
    alpha_p, alpha_n = (torch.full((1,), value, device=device).to(dtype) for value in (0.8, 0.8))

    def ours(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> tuple[Tensor, ...]:
        return (xielu(x, alpha_p, alpha_n, 0.5, -1e-6),)

    def plain(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> tuple[Tensor, ...]:  # as transformers does it
        below = (torch.expm1(torch.min(x, x.new_tensor(-1e-6))) - x) * alpha_n + 0.5 * x
        return (torch.where(x > 0, alpha_p * x * x + 0.5 * x, below),)

    size = x.numel() * x.element_size()
    inputs = {"x": x, "alpha_p": alpha_p, "alpha_n": alpha_n}
    return Example(inputs, ours, plain, ("x", "alpha_p", "alpha_n"), "B", {"forward": 2 * size, "backward": 3 * size})


_xielu = register_operation(
    Operation(
        "xielu",
        xielu_reference,
        check=_check,
        backends=(backend.cpp(_cpp), backend.triton("cogsym.kernels.xielu:xielu")),
        fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        autograd=(_setup, _backward),
        example=_example,
    )
)
_xielu_backward = register_operation(
    Operation(
        "xielu_backward",
        xielu_backward_reference,
        check=_check_backward,
        backends=(backend.cpp(_cpp_backward), backend.triton("cogsym.kernels.xielu:xielu_backward")),
        fake=_fake_backward,
        part_of="xielu",
    )
)
