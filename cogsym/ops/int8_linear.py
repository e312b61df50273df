"""A linear map whose weight is 8-bit integers, with a scale for each of its rows.

    y = x Wᵀ + b,  dx = dy W,  W[n, k] = scale[n] · q[n, k],  q = round(w / scale),  scale[n] = max_k |w[n, k]| / 127

Weights that never change take a quarter of float32's memory so, half of bfloat16's, and products of few rows, which
take the time of reading the weights, as much less. Forward and gradient are those of the same W. Quantisation by row,
symmetric, to the nearest: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), 2.

On the CPU the integers are widened block by block on their way into the cache, as `cogsym.ops.linear` does it with
other types, and sums are float32. Where the processor multiplies the type of x itself (AMX), a weight that meets many
rows is widened as a whole, into memory that is free again behind the product, and PyTorch multiplies. Few rows of
bfloat16 are taken as integers themselves there, three digits of 8 bits a value, so that the sums are exact. On a GPU
Triton takes few rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, cpp
from cogsym.ops.checks import check_floating, check_rows
from cogsym.ops.linear import linear_flops, product, widen_int8
from cogsym.ops.operation import Example, Operation, Sizes, register_operation
from cogsym.ops.products import native

_LARGEST = 127  # of the integers' magnitudes; -128 is not used, so that they are symmetric


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight, [N, K], as (int8 [N, K], the scales of its rows, float32 [N]); rows of zeros have the scale 1.

    Raises:
        TypeError: it is not floating point.
        ValueError: a value is not finite.
    """
    check_floating("quantise", "weight", weight)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = wide.abs().amax(dim=1, keepdim=True) if wide.numel() else wide.new_zeros(len(wide), 1)
    if not largest.isfinite().all():
        raise ValueError("quantise: weight has values that are not finite, expected finite ones; correct them.")
    scale = (largest / _LARGEST).float()
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return (wide / scale).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale[:, 0]


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y, rounded once; where PyTorch multiplies, W is rounded to the type of x before.

    Args:
        x: [..., K], floating point; rows may be strided.
        weight: q, int8 [N, K]; rows may be strided.
        scale: float32 or float64, [N].
        bias: b, [N], floating point.

    Returns:
        [..., N], contiguous, dtype of x. Only x and the bias have a gradient.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: x or the bias is not floating point, the weight is not int8, or the scale is another type.
        RuntimeError: tensors on different devices.
    """
    return _linear(x, weight, scale, bias)


def int8_linear_input_gradient(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dx, [..., K] in the dtype of dy, of an `int8_linear` whose gradient is not left to autograd.

    Args:
        dy: [..., N], floating point; rows may be strided.
        weight: q, int8 [N, K]; rows may be strided.
        scale: float32 or float64, [N].
    """
    return _input_gradient(dy, weight, scale)


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W in a dtype, [N, K], from int8 and the scales of its rows; each number is rounded once."""
    if weight.is_cpu and cpp.extension is not None and dtype in _WIDENED and backend.forced() != "reference":
        out = weight.new_empty(weight.shape, dtype=dtype)
        widen_int8(cpp.contiguous_rows(weight), scale.float().contiguous(), out)
        return out
    wide = torch.promote_types(dtype, torch.float32)
    return (weight.to(wide) * scale.to(wide)[:, None]).to(dtype)


_WIDENED = (torch.float32, torch.bfloat16, torch.float16)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_linear` in plain PyTorch."""
    return F.linear(x, dequantised(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))


def int8_linear_input_gradient_reference(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`int8_linear_input_gradient` in plain PyTorch."""
    return dy @ dequantised(weight, scale, dy.dtype)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    _check_weight("x", x, weight, scale, 1)
    if bias is not None:
        if bias.shape != scale.shape:
            raise ValueError(
                f"int8_linear: bias has shape {tuple(bias.shape)}, expected ({len(weight)},) to match weight."
            )
        check_floating("int8_linear", "bias", bias)


def _check_weight(name: str, x: Tensor, weight: Tensor, scale: Tensor, dim: int) -> None:
    """That rows of x are as long as the weight's dimension `dim`."""
    check_rows("int8_linear", name, x)
    of_weight = weight.shape
    if len(of_weight) != 2 or x.shape[-1] != of_weight[dim]:
        expected = "[..., K] and [N, K]" if dim else "[..., N] and [N, K]"
        raise ValueError(
            f"int8_linear: {name} has shape {tuple(x.shape)} and weight {tuple(of_weight)}, expected {expected}."
        )
    if scale.shape != of_weight[:1]:
        raise ValueError(
            f"int8_linear: scale has shape {tuple(scale.shape)}, expected ({of_weight[0]},) to match weight."
        )
    for what, tensor, dtypes in (("weight", weight, (torch.int8,)), ("scale", scale, (torch.float32, torch.float64))):
        if tensor.dtype not in dtypes:
            raise TypeError(f"int8_linear: {what} has dtype {tensor.dtype}, expected {dtypes[0]}; see `quantise`.")


def _refuses(device: str, dtype: torch.dtype, rows: int = 0) -> str | None:
    return "by PyTorch, as sums of the kernel are float32" if dtype == torch.float64 else None


# By the bytes: a widened copy of the weight is as nothing beside the products of more rows.
_FEW_ON_A_GPU = 32  # what cogsym.kernels.int8_linear takes at most


def _triton_refuses(device: str, dtype: torch.dtype, rows: int = 0) -> str | None:
    if rows > _FEW_ON_A_GPU:
        return "by PyTorch's product with the weight widened, which many rows are worth"
    return _refuses(device, dtype)


def _facts(x: Tensor, *_: Any) -> dict[str, Any]:
    return {"rows": x.numel() // max(x.shape[-1], 1)}


# Up to so many rows the kernel's products take less time than widening the weight and PyTorch's product, where PyTorch
# multiplies the type itself; of y with AMX, half its time at so many.
_FEW, _FEW_BY_AMX = 16, 32


def _kernel_multiplies(x: Tensor, few: int = _FEW) -> bool:
    """Whether not PyTorch, with the weight widened before."""
    return x.dtype == torch.float32 or not native(x.dtype) or x.numel() <= few * x.shape[-1]


def _cpp(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if _kernel_multiplies(x, _FEW_BY_AMX if cpp.extension.isa() == "amx_bf16" else _FEW):
        return product(x, weight, bias, True, scale=scale.float().contiguous())
    return int8_linear_reference(x, weight, scale, bias)


def _cpp_input_gradient(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if _kernel_multiplies(dy):
        return product(dy, weight, None, False, scale=scale.float().contiguous())
    return int8_linear_input_gradient_reference(dy, weight, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, bias = inputs
    ctx.save_for_backward(weight, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_dx, _, _, need_dbias = ctx.needs_input_grad
    dx = int8_linear_input_gradient(dy, *ctx.saved_tensors) if need_dx else None
    if not need_dbias:
        return dx, None, None, None
    rows = dy.reshape(-1, dy.shape[-1]).to(torch.promote_types(torch.float32, dy.dtype))
    return dx, None, None, rows.sum(0).to(ctx.bias_dtype)


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Gate and up of an MLP in one."""
    x = torch.randn(sizes.rows, sizes.length, sizes.width, device=device).to(dtype)
    # Of any values, so that they can be had on the meta device too.
    weight = torch.randint(-_LARGEST, _LARGEST + 1, (2 * sizes.mlp_width, sizes.width), dtype=torch.int8, device=device)
    scale = torch.rand(len(weight), device=device) / _LARGEST
    flops = 2.0 * x.numel() * len(weight)
    return Example(
        {"x": x, "weight": weight, "scale": scale},
        lambda x, weight, scale: (int8_linear(x, weight, scale),),
        lambda x, weight, scale: (int8_linear_reference(x, weight, scale, None),),
        ("x",),
        "FLOP",
        {"forward": flops, "backward": flops},
    )


_linear = register_operation(
    Operation(
        "int8_linear",
        int8_linear_reference,
        check=_check,
        backends=(
            backend.cpp(_cpp, _refuses),
            backend.triton("cogsym.kernels.int8_linear:int8_linear", _triton_refuses),
        ),
        facts=_facts,
        fake=lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], len(weight)),
        autograd=(_setup, _backward),
        flops=linear_flops,
        example=_example,
    )
)
_input_gradient = register_operation(
    Operation(
        "int8_linear_input_gradient",
        int8_linear_input_gradient_reference,
        check=lambda dy, weight, scale: _check_weight("dy", dy, weight, scale, 0),
        backends=(
            backend.cpp(_cpp_input_gradient, _refuses),
            backend.triton("cogsym.kernels.int8_linear:int8_linear_input_gradient", _triton_refuses),
        ),
        facts=_facts,
        fake=lambda dy, weight, scale: dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        flops=linear_flops,
        part_of="int8_linear",
    )
)
