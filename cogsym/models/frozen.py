"""A frozen block: its forward without autograd, and the gradient for its input from what that forward kept.

Nothing here computes a gradient for a weight, and nothing is kept that only such a gradient would need: not the inputs
of the products, not z = act(g) · u, not attention's probabilities. From the gradient dy of

    h = x + attention output,  [g; u] = Wgu norm(h),  y = h + Wd (act(g) · u)

    dz = dy Wd;   [dg; du] from dz, g, u;   dh = dy + norm'(  [dg; du] Wgu  )
    do = dh Wo;   dq, dk, dv from do, q, k, v, o, lse;   dx = dh + norm'(  [dq; dk; dv] Wqkv  )

and what was not kept is computed again first. The down projection never is, unless a norm follows it and only x was
kept; attention is only where o was not kept. Each square bracket is one product.

Bytes kept for a token, with element size s, D wide, H query and G key heads of size d, and F wide in the MLP:

    "all"         s (2 D + (2 H + 2 G) d + 2 F) + 4 H      x, h, q, k, v, o, lse, g, u
    "attention"   s (2 D + H d) + 4 H                      x, h, o, lse
    "input"       s D                                      x

A norm behind attention keeps what it normalises instead of h, from which h follows; one behind the MLP keeps what it
normalises too, s D more in the first two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cogsym import ops
from cogsym.models.block import Block, Norm, Positions

Keep = Literal["all", "attention", "input"]


@dataclass
class Kept:
    """What a frozen block's forward leaves for the gradient of its input; None: to be computed again.

    Attributes:
        x: the block's input, [B, T, D].
        o: attention's output, [B, T, H, d].
        lse: the logarithm of each query's sum of exponentials, [B, H, T].
        middle: h, or where a norm follows attention what it normalises; [B, T, D].
        down: where a norm follows the MLP what it normalises, [B, T, D].
        qkv: queries, keys and values as their product gives them, [B, T, (H + 2 G) d].
        gate_up: g and u side by side, [B, T, 2 F].
    """

    x: Tensor
    o: Tensor | None = None
    lse: Tensor | None = None
    middle: Tensor | None = None
    down: Tensor | None = None
    qkv: Tensor | None = None
    gate_up: Tensor | None = None


def forward(block: Block, x: Tensor, positions: Positions, keep: Keep) -> tuple[Tensor, Kept]:
    """(y, what is kept). Call it without autograd."""
    dtype = _compute_dtype(x)
    kept = Kept(x)
    h = _attention_half(block, kept, positions, dtype)
    kept.gate_up = _gate_up(block, h, dtype)
    y, kept.down = _mlp_output(block, h, kept.gate_up, dtype)
    if keep == "input":
        return y, Kept(x)
    if keep == "attention":
        kept.qkv = kept.gate_up = None
    return y, kept


def input_gradient(block: Block, dy: Tensor, kept: Kept, positions: Positions) -> Tensor:
    """dx, [B, T, D] in the dtype of x. Call it without autograd; it fills `kept` with what it computes again."""
    dtype = _compute_dtype(kept.x)
    if kept.o is None:
        h = _attention_half(block, kept, positions, dtype)
    else:
        assert kept.middle is not None
        h = _stream(block, kept.x, kept.middle)
    if kept.gate_up is None:
        kept.gate_up = _gate_up(block, h, dtype)
    if block.mlp_output_norm and kept.down is None:
        kept.down = _mlp_output(block, h, kept.gate_up, dtype)[1]
    dz = block.down.input_gradient(_before_adding(block, dy, block.mlp_output_norm, kept.down).to(dtype))
    gate, up = kept.gate_up.chunk(2, dim=-1)
    dgate_up = ops.gated_activation_gradients(dz, gate, up, block.activation)
    del dz, gate, up
    kept.gate_up = None  # the largest of them, and used up
    dh = _through_norm(block.mlp_norm, block.gate_up.input_gradient(dgate_up), h, dy)
    del dgate_up
    do = block.output.input_gradient(_before_adding(block, dh, block.attention_output_norm, kept.middle).to(dtype))
    dqkv = _attention_gradient(block, do, kept, positions, dtype)
    return _through_norm(block.attention_norm, block.qkv.input_gradient(dqkv), kept.x, dh)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, as transformers' own forward would have it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _attention_half(block: Block, kept: Kept, positions: Positions, dtype: torch.dtype) -> Tensor:
    """h, from x; fills `kept` with qkv, o, lse and the middle."""
    _project(block, kept, dtype)
    q, k, v = _heads(block, kept, positions)
    kept.o, kept.lse = ops.attention(q, k, v, block.attention_options(positions))
    if positions.blind is not None:
        kept.o.masked_fill_(positions.blind, 0)
    kept.middle = block.output.product(kept.o.flatten(-2), dtype)
    if block.attention_output_norm is None:
        # In place: a residual stream of another dtype than the products' takes the sum, as PyTorch's promotion has it.
        added = kept.middle if block.residual_scale == 1 else kept.middle.mul_(block.residual_scale)
        kept.middle = added.add_(kept.x) if added.dtype == kept.x.dtype else added + kept.x
    return _stream(block, kept.x, kept.middle)


def _project(block: Block, kept: Kept, dtype: torch.dtype) -> None:
    n = block.attention_norm(kept.x) if block.attention_norm else kept.x
    kept.qkv = block.qkv.product(n, dtype)


def _heads(block: Block, kept: Kept, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    assert kept.qkv is not None
    q, k, v = kept.qkv.split(block.qkv.sizes, dim=-1)
    return block.heads(q, k, v, positions.cos, positions.sin)


def _stream(block: Block, x: Tensor, middle: Tensor) -> Tensor:
    """h."""
    if block.attention_output_norm is None:
        return middle
    return _add(x, block.attention_output_norm(middle), block.residual_scale)


def _gate_up(block: Block, h: Tensor, dtype: torch.dtype) -> Tensor:
    return block.gate_up.product(block.mlp_norm(h) if block.mlp_norm else h, dtype)


def _mlp_output(block: Block, h: Tensor, gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(y, what the norm behind the MLP normalises, where there is one)."""
    gate, up = gate_up.chunk(2, dim=-1)
    z = ops.gated_activation(gate, up, block.activation)
    down = block.down.product(z, dtype)
    if block.mlp_output_norm:
        return _add(h, block.mlp_output_norm(down), block.residual_scale), down
    return _add(h, down, block.residual_scale), None


def _add(stream: Tensor, added: Tensor, scale: float) -> Tensor:
    return stream + added if scale == 1 else torch.add(stream, added, alpha=scale)


def _before_adding(block: Block, gradient: Tensor, norm: Norm | None, normalised: Tensor | None) -> Tensor:
    """The gradient of what a half of the block adds to the stream, before its scale and norm."""
    gradient = gradient if block.residual_scale == 1 else gradient * block.residual_scale
    if norm is None:
        return gradient
    assert normalised is not None
    return norm.input_gradient(gradient, normalised)


def _through_norm(norm: Norm | None, gradient: Tensor, x: Tensor, stream: Tensor) -> Tensor:
    """The gradient of x, from that of a product's input and that of the residual stream past it."""
    if norm is None:
        return stream + gradient
    return norm.input_gradient(gradient.to(x.dtype), x, stream)


def _attention_gradient(block: Block, do: Tensor, kept: Kept, positions: Positions, dtype: torch.dtype) -> Tensor:
    """dqkv, side by side."""
    if kept.qkv is None:
        _project(block, kept, dtype)
    assert kept.qkv is not None and kept.o is not None and kept.lse is not None
    q, k, v = _heads(block, kept, positions)
    do = do.view(kept.o.shape)
    if positions.blind is not None:
        do = do.masked_fill(positions.blind, 0)
    dq, dk, dv = ops.attention_gradients(do, q, k, v, kept.o, kept.lse, block.attention_options(positions))
    del q, k, v
    if block.rotated:
        dq, dk = (ops.rotary(t, positions.cos, positions.sin, inverse=True) for t in (dq, dk))
    if block.q_norm and block.k_norm:
        raw = kept.qkv.split(block.qkv.sizes, dim=-1)
        if block.normed == "head":
            dq, dk = (
                norm.input_gradient(d, t.unflatten(-1, d.shape[-2:]))
                for norm, d, t in zip((block.q_norm, block.k_norm), (dq, dk), raw[:2], strict=True)
            )
        else:
            dq, dk = (
                block.q_norm.input_gradient(dq.flatten(-2), raw[0]),
                block.k_norm.input_gradient(dk.flatten(-2), raw[1]),
            )
    return torch.cat([t.reshape(*kept.qkv.shape[:-1], -1) for t in (dq, dk, dv)], dim=-1)
