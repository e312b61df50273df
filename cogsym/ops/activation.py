"""The elementwise middle of an MLP: z = act(gate) · up, or z = act(x) where there is no gate.

    silu(x)      = x · σ(x)
    gelu_tanh(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    gelu(x)      = x/2 · (1 + erf(x/√2))
    relu(x)      = max(x, 0)
    relu2(x)     = max(x, 0)²

Sources: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; Hendrycks and Gimpel, "Gaussian Error Linear
Units", arXiv 1606.08415; the square, So et al., "Primer", arXiv 2109.08668.

    dgate = dz · up · act'(gate),   dup = dz · act(gate)

gate and up are kept for the backward pass, nothing else; their gradients lie side by side, as one product wants them.
Everything is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import backend, cpp
from cogsym.ops.checks import check_like, check_rows
from cogsym.ops.operation import Example, Operation, Sizes, register_operation

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_CODES: dict[str, int] = {name: code for code, name in enumerate(ACTIVATIONS)}  # of csrc/activation.cpp


def activation(x: Tensor, kind: Activation) -> Tensor:
    """z = act(x), the middle of an MLP without a gate.

    Args:
        x: [..., F], floating point; rows may be strided.
        kind: one of `ACTIVATIONS`.

    Returns:
        [..., F], contiguous, dtype of x.

    Raises:
        ValueError: an unknown kind.
        TypeError: x is not floating point.
    """
    return _gated_activation(x, None, kind)


def activation_gradient(dz: Tensor, x: Tensor, kind: Activation) -> Tensor:
    """dx, [..., F], of an `activation` whose gradient is not left to autograd; dz is like x."""
    return _gated_activation_backward(dz, x, None, kind, True, False)


def gated_activation(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """z = act(gate) · up.

    Args:
        gate: [..., F], floating point; rows may be strided, as the halves of a fused [..., 2F] product are.
        up: like `gate`.
        kind: one of `ACTIVATIONS`.

    Returns:
        [..., F], contiguous, dtype of gate.

    Raises:
        ValueError: shapes or dtypes that differ, or an unknown kind.
        TypeError: gate is not floating point.
        RuntimeError: tensors on different devices.
    """
    return _gated_activation(gate, up, kind)


def gated_activation_gradients(dz: Tensor, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    """[dgate, dup], [..., 2F], of a `gated_activation` whose gradient is not left to autograd; dz is like gate."""
    return _gated_activation_backward(dz, gate, up, kind, True, True)


def gated_activation_reference(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """`gated_activation`, and `activation` where `up` is None, in plain PyTorch."""
    z = _FUNCTIONS[kind](_compute_dtype(gate))
    return (z if up is None else z * _compute_dtype(up)).to(gate.dtype).contiguous()


def gated_activation_backward_reference(
    dz: Tensor, gate: Tensor, up: Tensor | None, kind: str, need_dgate: bool, need_dup: bool
) -> Tensor:
    """Gradients that are needed: [..., 2F] with dgate and dup side by side, or [..., F]."""
    d, g = _compute_dtype(dz), _compute_dtype(gate)
    of_gate = d if up is None else d * _compute_dtype(up)
    gradients = []
    if need_dgate:
        gradients.append(of_gate * _SLOPES[kind](g))
    if need_dup:
        gradients.append(d * _FUNCTIONS[kind](g))
    return torch.cat([gate.new_empty(*gate.shape[:-1], 0), *(g.to(gate.dtype) for g in gradients)], dim=-1)


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = (2 / torch.pi) ** 0.5, 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * scale * (1 + 3 * cubic * x**2)


def _gelu_slope(x: Tensor) -> Tensor:
    # Where the bell is 0, x may be infinite, and 0 · infinity is not 0.
    bell = torch.exp(-0.5 * x.square())
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + torch.where(bell == 0, 0, x * bell * (2 * torch.pi) ** -0.5)


def _relu_slope(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, (x > 0).to(x.dtype))


_FUNCTIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
_SLOPES = {
    "silu": _silu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "gelu": _gelu_slope,
    "relu": _relu_slope,
    "relu2": lambda x: 2 * F.relu(x),
}


def _check(gate: Tensor, up: Tensor | None, kind: str) -> None:
    operation, name = ("activation", "x") if up is None else ("gated_activation", "gate")
    check_rows(operation, name, gate)
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(
            f"gated_activation: gate is {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype}, "
            "expected the same shape and dtype."
        )
    if kind not in ACTIVATIONS:
        raise ValueError(f"{operation}: kind is {kind!r}, expected one of {', '.join(ACTIVATIONS)}.")


def _check_backward(dz: Tensor, gate: Tensor, up: Tensor | None, kind: str, *_: Any) -> None:
    _check(gate, up, kind)
    operation, name = ("activation", "x") if up is None else ("gated_activation", "gate")
    check_like(operation, name, gate, ("dz", dz))


def _compute_dtype(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cpp(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """By csrc/activation.cpp."""
    z = cpp.empty_like(gate)
    if gate.numel():
        g = cpp.rows(gate)
        u = g if up is None else cpp.rows(up)
        cpp.extension.gated_activation(
            g.data_ptr(), g.stride(0), 0 if up is None else u.data_ptr(), u.stride(0), z.data_ptr(), len(g), g.shape[1],
            _CODES[kind], cpp.DTYPES[gate.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return z


def _cpp_backward(dz: Tensor, gate: Tensor, up: Tensor | None, kind: str, need_dgate: bool, need_dup: bool) -> Tensor:
    """By csrc/activation.cpp."""
    d = _fake_backward(dz, gate, up, kind, need_dgate, need_dup)
    if d.numel():
        z, g = cpp.rows(dz), cpp.rows(gate)
        u = g if up is None else cpp.rows(up)
        dup = d.data_ptr() + (g.shape[1] * d.element_size() if need_dgate else 0)
        cpp.extension.gated_activation_backward(
            z.data_ptr(), z.stride(0), g.data_ptr(), g.stride(0), 0 if up is None else u.data_ptr(), u.stride(0),
            d.data_ptr() if need_dgate else 0, dup if need_dup else 0, d.shape[-1], len(g), g.shape[1],
            _CODES[kind], cpp.DTYPES[gate.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return d


def _fake_backward(dz: Tensor, gate: Tensor, up: Tensor | None, kind: str, need_dgate: bool, need_dup: bool) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], gate.shape[-1] * (need_dgate + need_dup))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    need_dgate, need_dup = ctx.needs_input_grad[:2]
    d, F = _gated_activation_backward(dz, gate, up, ctx.kind, need_dgate, need_dup), gate.shape[-1]
    return d[..., :F] if need_dgate else None, d[..., d.shape[-1] - F :] if need_dup else None, None


def _example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """On the halves of a fused product."""
    gate, up = torch.randn(sizes.rows, sizes.length, 2 * sizes.mlp_width, device=device).to(dtype).chunk(2, -1)

    def ours(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (gated_activation(gate, up, "silu"),)

    def plain(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (F.silu(gate) * up,)

    size = gate.numel() * gate.element_size()
    inputs = {"gate": gate.detach(), "up": up.detach()}
    return Example(inputs, ours, plain, ("gate", "up"), "B", {"forward": 3 * size, "backward": 5 * size})


_gated_activation = register_operation(
    Operation(
        "gated_activation",
        gated_activation_reference,
        check=_check,
        backends=(backend.cpp(_cpp), backend.triton("cogsym.kernels.activation:gated_activation")),
        fake=lambda gate, *_: torch.empty_like(gate, memory_format=torch.contiguous_format),
        autograd=(_setup, _backward),
        example=_example,
    )
)
_gated_activation_backward = register_operation(
    Operation(
        "gated_activation_backward",
        gated_activation_backward_reference,
        check=_check_backward,
        backends=(backend.cpp(_cpp_backward), backend.triton("cogsym.kernels.activation:gated_activation_backward")),
        fake=_fake_backward,
        part_of="gated_activation",
    )
)
