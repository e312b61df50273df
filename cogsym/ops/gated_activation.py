"""The elementwise middle of a gated MLP: z = act(gate) · up.

    silu(g)      = g · σ(g)
    gelu_tanh(g) = g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³)))

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; the tanh form of Hendrycks and Gimpel,
"Gaussian Error Linear Units", arXiv 1606.08415.

    dgate = dz · up · act'(gate),   dup = dz · act(gate)

gate and up are kept for the backward pass, nothing else; their gradients lie side by side, as one product wants them.
Everything is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """z = act(gate) · up.

    Args:
        gate: [..., F], floating point; rows may be strided, as the halves of a fused [..., 2F] product are.
        up: like `gate`.
        activation: "silu" or "gelu_tanh".

    Returns:
        [..., F], contiguous, dtype of gate.

    Raises:
        ValueError: shapes or dtypes that differ, or an unknown activation.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gated_activation: gate is {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}, "
            "expected the same shape and dtype."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_activation: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
    return _gated_activation(gate, up, activation)


def gated_activation_gradients(dz: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """[dgate, dup], [..., 2F], of a `gated_activation` whose gradient is not left to autograd."""
    return _gated_activation_backward(dz, gate, up, activation, True, True)


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`gated_activation` in plain PyTorch."""
    g, u = _compute_dtype(gate), _compute_dtype(up)
    act = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    return (act * u).to(gate.dtype).contiguous()


def gated_activation_backward_reference(
    dz: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> Tensor:
    """Gradients of `gated_activation` that are needed: [..., 2F] with dgate and dup side by side, or [..., F]."""
    d, g, u = (_compute_dtype(t) for t in (dz, gate, up))
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        act, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    else:
        scale, cubic = (2 / torch.pi) ** 0.5, 0.044715
        tanh = torch.tanh(scale * (g + cubic * g**3))
        act = 0.5 * g * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh**2) * scale * (1 + 3 * cubic * g**2)
    gradients = [g for g, needed in ((d * u * slope, need_dgate), (d * act, need_dup)) if needed]
    return torch.cat([gate.new_empty(*gate.shape[:-1], 0), *(g.to(gate.dtype) for g in gradients)], dim=-1)


def _compute_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.library.custom_op("cogsym::gated_activation", mutates_args=())
def _gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return backend.implementation("gated_activation", gated_activation_reference, gate)(gate, up, activation)


@torch.library.custom_op("cogsym::gated_activation_backward", mutates_args=())
def _gated_activation_backward(
    dz: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> Tensor:
    function = backend.implementation("gated_activation_backward", gated_activation_backward_reference, gate)
    return function(dz, gate, up, activation, need_dgate, need_dup)


@_gated_activation.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_gated_activation_backward.register_fake
def _(dz: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] * (need_dgate + need_dup))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    need_dgate, need_dup = ctx.needs_input_grad[:2]
    d, F = _gated_activation_backward(dz, gate, up, ctx.activation, need_dgate, need_dup), gate.shape[-1]
    return d[..., :F] if need_dgate else None, d[..., d.shape[-1] - F :] if need_dup else None, None


_gated_activation.register_autograd(_backward, setup_context=_setup)
