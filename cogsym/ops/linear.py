"""A linear map whose weight stays in its own element type.

    y = x Wᵀ + b,  dx = dy W

What weights are stored in and what they are multiplied in are two things. Where a processor has no unit for bfloat16,
PyTorch multiplies it at a tenth of float32's speed, and a copy of the weights in float32 takes twice their memory. Here
they are widened block by block on their way into the cache; sums are float32 and the outcome is rounded once, to the
type of x. Where PyTorch's own product is the fastest (equal types that the processor multiplies itself, and every other
device), it is what runs.

For weights that do not change: there is a gradient of x, and of the weight and the bias in plain PyTorch.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, cpp
from cogsym.ops.checks import check_floating, check_rows
from cogsym.ops.operation import Example, Operation, Sizes, register_operation
from cogsym.ops.products import native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y, computed in the wider of both types and float32 at least, but for equal types that PyTorch multiplies itself.

    Args:
        x: [..., K], floating point; rows may be strided.
        weight: W, [N, K], floating point; rows may be strided.
        bias: b, [N], floating point.

    Returns:
        [..., N], contiguous, dtype of x.

    Raises:
        ValueError: shapes that do not fit; where PyTorch's own product runs, its error.
        TypeError: a tensor that is not floating point, likewise.
        RuntimeError: tensors on different devices.
    """
    if _linear.implementation(x, weight, bias) is linear_reference:
        return linear_reference(x, weight, bias)  # nothing stands between a tracer and PyTorch's own product
    return _linear(x, weight, bias)


def linear_input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dx, [..., K] in the dtype of dy, of a `linear` whose gradient is not left to autograd.

    Args:
        dy: [..., N], floating point; rows may be strided.
        weight: W, [N, K], floating point; rows may be strided.
    """
    if _input_gradient.implementation(dy, weight) is linear_input_gradient_reference:
        return linear_input_gradient_reference(dy, weight)
    return _input_gradient(dy, weight)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_weight("x", x, weight, 1)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected ({len(weight)},) to match weight.")
        check_floating("linear", "bias", bias)


def _check_weight(name: str, x: Tensor, weight: Tensor, dim: int) -> None:
    """That rows of x are as long as the weight's dimension `dim`."""
    check_rows("linear", name, x)
    of_weight = weight.shape
    if len(of_weight) != 2 or x.shape[-1] != of_weight[dim]:
        expected = "[..., K] and [N, K]" if dim else "[..., N] and [N, K]"
        raise ValueError(
            f"linear: {name} has shape {tuple(x.shape)} and weight {tuple(of_weight)}, expected {expected}."
        )
    if not weight.dtype.is_floating_point:
        check_floating("linear", "weight", weight)


def multiply_into(out: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """x Wᵀ (`transposed`) or x W, without autograd.

    Args:
        out: where to, contiguous, [rows, features] in the dtype of x, or on a GPU in float32 where x is of 16 bits.
        x: [rows, features].
        weight: of the same type as x, or of one that x's holds exactly.
        transposed: which of them.
    """
    ours = _linear.implementation(x, weight, None) if transposed else _input_gradient.implementation(x, weight)
    if ours in (_cpp, _cpp_input_gradient):
        return product(x, weight, None, transposed, out)
    weight = weight.to(x.dtype)
    weight = weight.t() if transposed else weight
    return torch.mm(x, weight, out=out) if out.dtype == x.dtype else torch.mm(x, weight, out_dtype=out.dtype, out=out)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` in plain PyTorch."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def linear_input_gradient_reference(dy: Tensor, weight: Tensor) -> Tensor:
    """`linear_input_gradient` in plain PyTorch."""
    if dy.dtype == weight.dtype:
        return dy @ weight
    dtype = torch.promote_types(dy.dtype, weight.dtype)
    return (dy.to(dtype) @ weight.to(dtype)).to(dy.dtype)


# Rows of a float32 product that take less time here than in PyTorch: 0.5 to 0.9 of it with AVX2 and with AVX-512; one
# row takes the same, from 48 on PyTorch leads.
_FEW = range(2, 33)
_UNMEASURED = ("baseline", "bf16")  # a variant of plain x86-64 or of Arm

# Rows from which float32 products with weights of 16 bits take less time as PyTorch's (MKL's) of blocks of them, which
# are widened to at least so many rows and values: at 1,024 rows 0.94 to 0.99 of its speed with all weights at hand in
# float32 (AVX2; 0.87 to 0.96 with AVX-512), where csrc/linear.cpp has 0.85 to 0.98 (0.83 to 0.92).
_MANY, _BLOCK_ROWS, _BLOCK_VALUES = 512, 512, 400_000


def _library_leads() -> bool:
    return torch.backends.mkl.is_available() and cpp.extension.isa() not in _UNMEASURED


def _refuses(device: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, rows: int = 0) -> str | None:
    weight_dtype = weight_dtype or dtype
    if torch.float64 in (dtype, weight_dtype):
        return "by PyTorch, as sums of the kernel are float32"
    if dtype != weight_dtype or not native(dtype):
        return None
    if dtype == torch.float32 and rows in _FEW and cpp.extension.isa() not in _UNMEASURED:
        return None
    return "by PyTorch, which is as fast with equal types here"


def _facts(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    return {"weight_dtype": weight.dtype, "rows": x.numel() // max(x.shape[-1], 1)}


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b, or x W, by csrc/linear.cpp or by PyTorch's products with blocks of the weight; with `scale`, contiguous
    float32, [rows of the weight], the weight is int8."""
    N, K = weight.shape if transposed else weight.shape[::-1]
    y = x.new_empty(*x.shape[:-1], N) if out is None else out
    if not y.numel():
        return y
    if not K:
        return y.zero_() if bias is None else y.copy_(bias)
    rows, weight, bias = cpp.rows(x), cpp.contiguous_rows(weight), None if bias is None else cpp.table(bias)
    if x.dtype == torch.float32 != weight.dtype and len(rows) >= _MANY and _library_leads():
        _by_blocks(rows, weight, scale, bias, transposed, y.view(-1, N))
        return y
    cpp.extension.linear(
        rows.data_ptr(), weight.data_ptr(), cpp.address(scale), cpp.address(bias), y.data_ptr(), rows.stride(0),
        weight.stride(0), len(rows), N, K, transposed, cpp.DTYPES[x.dtype],
        cpp.DTYPES[torch.float32 if scale is not None else weight.dtype],
        cpp.DTYPES[torch.float32 if bias is None else bias.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def widen_int8(weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """W into `out`, contiguous, from integers and the scales of their rows; each number is rounded once."""
    cpp.extension.dequantised(
        weight.data_ptr(), scale.data_ptr(), out.data_ptr(), weight.stride(0), len(weight), weight.shape[1],
        cpp.DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip


_memory = threading.local()


def _block(size: int) -> Tensor:
    """Floats of this thread to widen weights in: fresh ones would cost more than they hold (their pages are made)."""
    memory = getattr(_memory, "block", None)
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):  # a tensor that was made in it could not be written to outside
            memory = _memory.block = torch.empty(size, dtype=torch.float32, device="cpu")
    return memory


def _by_blocks(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, transposed: bool, y: Tensor
) -> None:
    """`product` of many rows: rows of the weight are widened, as many at once as stay in a cache near the processor,
    for PyTorch's product."""
    features = weight.shape[1]
    parts = max(1, round(len(weight) / max(_BLOCK_ROWS, _BLOCK_VALUES / features)))
    count = -(-len(weight) // parts)  # of almost the same size: a short block spends its time on what surrounds it
    memory = _block(count * features)[: count * features].view(count, features)
    for start in range(0, len(weight), count):
        part = weight[start : start + count]
        block, those = memory[: len(part)], slice(start, start + len(part))
        if scale is None:
            block.copy_(part)
        else:
            widen_int8(part, scale[those], block)
        if not transposed:
            torch.addmm(y, x[:, those], block, beta=float(start > 0), out=y)
        elif bias is None:
            torch.mm(x, block.t(), out=y[:, those])
        else:
            torch.addmm(bias[those].float(), x, block.t(), out=y[:, those])


def _cpp(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias, True)


def _cpp_input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    return product(dy, weight, None, False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_dx, need_dweight, need_dbias = ctx.needs_input_grad
    dx = linear_input_gradient(dy, weight) if need_dx else None
    dtype = torch.promote_types(torch.float32, weight.dtype)
    rows = dy.reshape(-1, dy.shape[-1]).to(dtype)
    dweight = (rows.t() @ x.reshape(-1, x.shape[-1]).to(dtype)).to(weight.dtype) if need_dweight else None
    return dx, dweight, rows.sum(0).to(ctx.bias_dtype) if need_dbias else None


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Gate and up of an MLP in one, with weights in bfloat16."""
    x = torch.randn(sizes.rows, sizes.length, sizes.width, device=device).to(dtype)
    weight = torch.randn(2 * sizes.mlp_width, sizes.width, device=device).bfloat16()
    flops = 2.0 * x.numel() * len(weight)
    work = {"forward": flops, "backward": flops}
    return Example(
        {"x": x, "weight": weight},
        lambda x, weight: (linear(x, weight),),
        lambda x, weight: (linear_reference(x, weight, None),),
        ("x",),
        "FLOP",
        work,
    )


def linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of a product of x by a weight [N, K] or its transpose, from their shapes."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * int(weight[0]) * int(weight[1])


_linear = register_operation(
    Operation(
        "linear",
        linear_reference,
        check=_check,
        backends=(backend.cpp(_cpp, _refuses),),
        facts=_facts,
        fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)),
        autograd=(_setup, _backward),
        flops=linear_flops,
        example=_example,
    )
)
_input_gradient = register_operation(
    Operation(
        "linear_input_gradient",
        linear_input_gradient_reference,
        check=lambda dy, weight: _check_weight("dy", dy, weight, 0),
        backends=(backend.cpp(_cpp_input_gradient, _refuses),),
        facts=lambda dy, weight: {"weight_dtype": weight.dtype},
        fake=lambda dy, weight: dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        flops=linear_flops,
        part_of="linear",
    )
)
