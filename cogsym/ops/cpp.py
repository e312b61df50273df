"""The operations on CPU tensors, computed by the C++ extension `cogsym._C`.

Each function takes the arguments of its reference and passes addresses and strides on. Rows may be strided, so that a
slice of a fused projection is read where it lies; a copy is made only of what is not contiguous along its last
dimension.

The extension holds its kernels once for each instruction set and uses the fastest one that the processor runs. The
environment variable ``COGSYM_CPU_ISA`` names a slower one, to compare them or to hunt a fault.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cogsym import _C
from cogsym.errors import CogsymError
from cogsym.ops.logit_blocks import OnlineState

_DTYPE_CODES = {getattr(torch, name): code for code, name in enumerate(_C.DTYPES)}
_ACTIVATION_CODES = {name: code for code, name in enumerate(_C.ACTIVATIONS)}


def _choose_isa() -> None:
    name = os.environ.get("COGSYM_CPU_ISA")
    if not name:
        return
    if name not in _C.isas():
        expected = ", ".join(_C.isas())
        raise CogsymError(
            f"COGSYM_CPU_ISA is {name!r}, expected one of {expected} on this processor; correct or unset it."
        )
    _C.set_isa(name)


_choose_isa()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """As `cogsym.ops.rms_norm.rms_norm_reference`."""
    y = _empty_like(x)
    if x.numel():
        rows, weight = _rows(x), _table(weight)
        _C.rms_norm(
            rows.data_ptr(), rows.stride(0), 0, 0, weight.data_ptr(), y.data_ptr(), 0,
            rows.shape[0], rows.shape[1], eps, offset,
            _DTYPE_CODES[x.dtype], _DTYPE_CODES[weight.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """As `cogsym.ops.rms_norm.add_rms_norm_reference`."""
    y, h = _empty_like(x), _empty_like(x)
    if x.numel():
        rows, residual, weight = _rows(x), _rows(residual), _table(weight)
        _C.rms_norm(
            rows.data_ptr(), rows.stride(0), residual.data_ptr(), residual.stride(0), weight.data_ptr(),
            y.data_ptr(), h.data_ptr(),
            rows.shape[0], rows.shape[1], eps, offset,
            _DTYPE_CODES[x.dtype], _DTYPE_CODES[weight.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y, h


def rms_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    dh: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """As `cogsym.ops.rms_norm.rms_norm_backward_reference`."""
    dx = _empty_like(h) if need_dx else h.new_empty(0)
    if not h.numel():
        return dx, torch.zeros_like(weight) if need_dweight else weight.new_empty(0)
    table = _table(weight)
    dweight = torch.empty_like(table) if need_dweight else table.new_empty(0)
    rows, grad = _rows(h), _rows(dy)
    stream = grad if dh is None else _rows(dh)
    _C.rms_norm_backward(
        grad.data_ptr(), grad.stride(0), rows.data_ptr(), rows.stride(0),
        0 if dh is None else stream.data_ptr(), stream.stride(0), table.data_ptr(),
        dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0,
        rows.shape[0], rows.shape[1], eps, offset,
        _DTYPE_CODES[h.dtype], _DTYPE_CODES[table.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight.to(weight.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """As `cogsym.ops.rotary.rotary_reference`."""
    y = _empty_like(x)
    B, T, H, D = x.shape
    if x.numel():
        x, cos = _contiguous_rows(x), _table(cos)
        sin = _table(sin.to(cos.dtype))
        _C.rotary(
            x.data_ptr(), x.stride()[:3], cos.data_ptr(), _table_strides(cos), sin.data_ptr(), _table_strides(sin),
            y.data_ptr(), B, T, H, D, cos.shape[2], interleaved, inverse,
            _DTYPE_CODES[x.dtype], _DTYPE_CODES[cos.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return y


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As `cogsym.ops.activation.gated_activation_reference`."""
    z = _empty_like(gate)
    if gate.numel():
        g, u = _rows(gate), _rows(up)
        _C.gated_activation(
            g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), z.data_ptr(),
            g.shape[0], g.shape[1], _ACTIVATION_CODES[activation], _DTYPE_CODES[gate.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return z


def gated_activation_backward(
    dz: Tensor, gate: Tensor, up: Tensor, activation: str, need_dgate: bool, need_dup: bool
) -> Tensor:
    """As `cogsym.ops.activation.gated_activation_backward_reference`."""
    F = gate.shape[-1]
    d = gate.new_empty(*gate.shape[:-1], F * (need_dgate + need_dup))
    if d.numel():
        z, g, u = _rows(dz), _rows(gate), _rows(up)
        dup = d.data_ptr() + (F * d.element_size() if need_dgate else 0)
        _C.gated_activation_backward(
            z.data_ptr(), z.stride(0), g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0),
            d.data_ptr() if need_dgate else 0, dup if need_dup else 0, d.shape[-1],
            g.shape[0], F, _ACTIVATION_CODES[activation], _DTYPE_CODES[gate.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return d


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    sinks: None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `cogsym.ops.attention.attention_reference`."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    o, lse = _empty_like(q), torch.empty_like(q[..., 0].mT, dtype=lse_dtype, memory_format=torch.contiguous_format)
    if q.numel():
        q, k, v = _contiguous_rows(q), _contiguous_rows(k), _contiguous_rows(v)
        starts = None if starts is None else starts.contiguous()
        _C.attention(
            *_attention_inputs(q, k, v, starts, scale, window, soft_cap), o.data_ptr(), lse.data_ptr()
        )  # fmt: skip
    return o, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cogsym.ops.attention.attention_backward_reference`."""
    dq = _empty_like(q) if need_dq else q.new_empty(0)
    dk = _empty_like(k) if need_dk else k.new_empty(0)
    dv = _empty_like(v) if need_dv else v.new_empty(0)
    if q.numel() and (need_dq or need_dk or need_dv):
        q, k, v, dout = _contiguous_rows(q), _contiguous_rows(k), _contiguous_rows(v), _contiguous_rows(dout)
        starts = None if starts is None else starts.contiguous()
        o, lse = o.contiguous(), lse.contiguous()
        _C.attention_backward(
            *_attention_inputs(q, k, v, starts, scale, window, soft_cap),
            dout.data_ptr(), dout.stride()[:3], o.data_ptr(), lse.data_ptr(),
            dq.data_ptr() if need_dq else 0, dk.data_ptr() if need_dk else 0, dv.data_ptr() if need_dv else 0,
        )  # fmt: skip
    return dq, dk, dv


def _attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, scale: float, window: int | None, soft_cap: float | None
) -> tuple[
    int, tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...], int, tuple[int, int, int, int, int],
    float, int, float, int, int,
]:  # fmt: skip
    """The arguments that both directions begin with."""
    B, T, H, D = q.shape
    return (
        q.data_ptr(), q.stride()[:3], k.data_ptr(), k.stride()[:3], v.data_ptr(), v.stride()[:3],
        0 if starts is None else starts.data_ptr(), (B, T, H, k.shape[2], D),
        scale, window or 0, soft_cap or 0.0, _DTYPE_CODES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    sinks: Tensor | None,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    """As `cogsym.ops.decode_attention.decode_attention_reference`."""
    o = _empty_like(q)
    if q.numel():
        q, k, v = _contiguous_rows(q), _contiguous_rows(k), _contiguous_rows(v)
        begins, ends = begins.contiguous(), ends.contiguous()
        (N, H, D), KV, M = q.shape, k.shape[1], begins.shape[1]
        _C.decode_attention(
            q.data_ptr(), q.stride()[:2], k.data_ptr(), k.stride()[:2], v.data_ptr(), v.stride()[:2],
            begins.data_ptr(), ends.data_ptr(), (N, M, H, KV, D), scale, soft_cap or 0.0,
            _DTYPE_CODES[q.dtype], torch.get_num_threads(), o.data_ptr(),
        )  # fmt: skip
    return o


def online_softmax(
    logits: Tensor,
    first: int,
    targets: Tensor,
    state: OnlineState,
    rescale: Tensor,
    scale: float,
    soft_cap: float,
    exponentials: bool,
) -> None:
    """As `cogsym.ops.logit_blocks.online_softmax_reference`."""
    logit_sum, argmax = state.logit_sum, state.argmax
    _C.online_softmax(
        logits.data_ptr(), targets.data_ptr(), state.maximum.data_ptr(), state.total.data_ptr(),
        state.target_logit.data_ptr(), rescale.data_ptr(),
        0 if logit_sum is None else logit_sum.data_ptr(), 0 if argmax is None else argmax.data_ptr(),
        logits.shape[0], logits.shape[1], first, scale, soft_cap, exponentials,
        _DTYPE_CODES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> OnlineState | None:
    """The statistics of every row, [N, D], over all columns in one pass; None where this processor has none for it."""
    if hidden.dtype != torch.bfloat16 or not len(hidden):
        return None
    hidden, weight, targets = _contiguous_rows(hidden), _contiguous_rows(weight), targets.contiguous()
    # Each of its own: an operation's outputs share no memory.
    maximum, total, target_logit = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
    argmax = targets.new_zeros(len(targets))
    done = _C.token_scores(
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), targets.data_ptr(),
        maximum.data_ptr(), total.data_ptr(), target_logit.data_ptr(), argmax.data_ptr(),
        (len(hidden), *weight.shape), scale, torch.get_num_threads(),
    )  # fmt: skip
    return OnlineState(maximum, total, target_logit, None, argmax) if done else None


def add_rescaled(total: Tensor, product: Tensor, rescale: Tensor) -> None:
    """As `cogsym.ops.logit_blocks.add_rescaled_reference`."""
    _C.add_rescaled(
        total.data_ptr(), product.data_ptr(), rescale.data_ptr(), product.shape[0], product.shape[1],
        _DTYPE_CODES[product.dtype], torch.get_num_threads(),
    )  # fmt: skip


def logits_gradient(
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
    """As `cogsym.ops.logit_blocks.logits_gradient_reference`."""
    _C.logits_gradient(
        logits.data_ptr(), targets.data_ptr(), logsumexp.data_ptr(), dloss.data_ptr(),
        logits.shape[0], logits.shape[1], first, scale, soft_cap, confidence, floor,
        _DTYPE_CODES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _contiguous_rows(x: Tensor) -> Tensor:
    """`x`, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """`x` as [rows, D], a view where its strides allow it."""
    return _contiguous_rows(x.reshape(-1, x.shape[-1]))


def _table(x: Tensor) -> Tensor:
    """A weight, cos or sin in a dtype that the kernels read."""
    return _contiguous_rows(x if x.dtype in _DTYPE_CODES else x.float())


def _table_strides(x: Tensor) -> tuple[int, int]:
    return 0 if x.shape[0] == 1 else x.stride(0), x.stride(1)
