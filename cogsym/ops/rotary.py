"""Rotary position embedding.

The first R of a head's D features are R/2 pairs; pair i at a position is turned by that position's angle for pair i:

    a' = a · cos_i - b · sin_i
    b' = b · cos_i + a · sin_i

Source: Su et al., "RoFormer", arXiv 2104.09864. The pair is (i, i + R/2) in Llama, Mistral, Qwen and Gemma, and
(2i, 2i + 1) in the paper's interleaved form. R < D is partial rotary: the rest passes unchanged. Scaled variants
(linear, dynamic, YaRN, Llama 3) differ only in the cos and sin that they pass, a scale of the attention included.

A rotation's gradient is the rotation back, so nothing but cos and sin is kept. It is computed in float32 (float64 for
float64) and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogsym.ops import backend, cpp
from cogsym.ops.checks import check_floating
from cogsym.ops.operation import Example, Operation, Sizes, register_operation


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False) -> Tensor:
    """Rotate the heads of queries or keys, or of both side by side along H.

    Args:
        x: [B, T, H, D], floating point, any strides; a slice of a fused projection will do.
        cos: [B, T, R/2] or [1, T, R/2], R <= D; one column a pair.
        sin: like `cos`, dtype too; any floating-point one.
        interleaved: pairs are neighbours, not halves.
        inverse: turn back, which is also what a gradient needs.

    Returns:
        [B, T, H, D], contiguous, dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a gradient wanted for cos or sin (there is none).
        TypeError: cos and sin of different dtypes, or a tensor that is not floating point.
        RuntimeError: tensors on different devices.
    """
    return _rotary(x, cos, sin, interleaved, inverse)


def _check(x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> None:
    if x.dim() != 4:
        raise ValueError(f"rotary: x has shape {tuple(x.shape)}, expected [B, T, H, D].")
    B, T, _, D = x.shape
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, B) or cos.shape[1] != T:
        raise ValueError(
            f"rotary: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}, expected both "
            f"[{B} or 1, {T}, R/2] to match x."
        )
    if 2 * cos.shape[2] > D:
        raise ValueError(
            f"rotary: cos has {cos.shape[2]} columns, expected at most {D // 2}, one a pair of x's D = {D}."
        )
    if cos.dtype != sin.dtype:
        raise TypeError(f"rotary: cos has dtype {cos.dtype} and sin {sin.dtype}, expected one.")
    check_floating("rotary", "x", x)
    check_floating("rotary", "cos", cos)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rotary: cos or sin requires a gradient, which this operation does not compute; detach them.")


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """`rotary` in plain PyTorch; `inverse` turns back."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    c, s = (t.to(compute).unsqueeze(2) for t in (cos, sin))  # [B or 1, T, 1, R/2]
    if inverse:
        s = -s
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(compute), x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = a * c - b * s, b * c + a * s
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned.to(x.dtype), rest), -1).contiguous()


def _cpp(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """By csrc/rotary.cpp."""
    y = cpp.empty_like(x)
    if x.numel():
        (B, T, H, D), x, cos = x.shape, cpp.contiguous_rows(x), cpp.table(cos)
        sin = cpp.table(sin)
        of_cos, of_sin = ((0 if t.shape[0] == 1 else t.stride(0), t.stride(1)) for t in (cos, sin))
        cpp.extension.rotary(
            x.data_ptr(), x.stride()[:3], cos.data_ptr(), of_cos, sin.data_ptr(), of_sin, y.data_ptr(), B, T, H, D,
            cos.shape[2], interleaved, inverse, cpp.DTYPES[x.dtype], cpp.DTYPES[cos.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _rotary(dy, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """On the queries where a fused projection left them."""
    D, heads, length = sizes.head_dim, sizes.heads, sizes.length
    qkv = torch.randn(sizes.rows, length, heads + 2 * sizes.kv_heads, D, device=device).to(dtype)
    angles = torch.arange(length, device=device)[:, None] * 10000 ** -torch.linspace(0, 1, D // 2, device=device)
    cos, sin = (t[None].to(dtype) for t in (angles.cos(), angles.sin()))

    def ours(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return (rotary(q, cos, sin),)

    def plain(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:  # as transformers does it
        cos, sin = (torch.cat((t, t), -1)[:, :, None] for t in (cos, sin))
        a, b = q.chunk(2, -1)
        return (q * cos + torch.cat((-b, a), -1) * sin,)

    q = qkv[:, :, :heads]
    size = 2 * q.numel() * q.element_size()
    inputs = {"q": q.detach(), "cos": cos, "sin": sin}
    return Example(inputs, ours, plain, ("q",), "B", {"forward": size, "backward": size})


_rotary = register_operation(
    Operation(
        "rotary",
        rotary_reference,
        check=_check,
        backends=(backend.cpp(_cpp), backend.triton("cogsym.kernels.rotary:rotary")),
        fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        autograd=(_setup, _backward),
        example=_example,
    )
)
