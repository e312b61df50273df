"""A block's two halves without autograd, each adding its contribution to the residual stream.

Queries, keys and values may be those of many sequences and of many states of each; which keys a query sees is the
caller's, who passes `attend`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cogsym import ops
from cogsym.models.block import Block, Norm
from cogsym.models.projections import Projections

# (q [B, T, H, d], k [B, S, KV, d], v like k) -> o [B, T, H, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_QUERIES, _KEYS_VALUES, _ALL = slice(0, 1), slice(1, 3), slice(0, 3)


def add_attention(block: Block, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> None:
    """Add attention's contribution to x, in place.

    Args:
        block: the layer.
        x: the residual stream, [B, T, D].
        cos: [B or 1, T, R/2].
        sin: like `cos`.
        attend: attention.
    """
    q, k, v = _outputs(block.qkv, _normed(block.attention_norm, x), _ALL)
    if block.rotated and block.q_norm is block.k_norm is None and _beside(q, k):
        both = q.as_strided((*q.shape[:-1], q.shape[-1] + k.shape[-1]), q.stride(), q.storage_offset())
        heads = q.shape[-1] // block.attention.head_dim
        q, k = block.rotate(both, None, cos, sin).tensor_split([heads], dim=-2)
        o = attend(q, k, v.unflatten(-1, (-1, block.attention.head_dim)))
    else:
        o = attend(*block.heads(q, k, v, cos, sin))
    _add(block, x, block.output, o.flatten(-2), block.attention_output_norm)


def attention_added_at(block: Block, x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    """x with attention's contribution at some positions only, [B, P, D]; keys and values are those of all.

    Args:
        block: the layer.
        x: the residual stream, [B, T, D]; left as it is.
        rows: the positions, int64 [P].
        cos: [B or 1, T, R/2].
        sin: like `cos`.
        attend: attention of the chosen queries to all keys.
    """
    n, chosen = _normed(block.attention_norm, x), x[:, rows]
    (q,) = _outputs(block.qkv, n[:, rows], _QUERIES)
    k, v = _outputs(block.qkv, n, _KEYS_VALUES)
    q = block.rotate(q, block.q_norm, cos[:, rows], sin[:, rows])
    k = block.rotate(k, block.k_norm, cos, sin)
    o = attend(q, k, v.unflatten(-1, k.shape[-2:]))
    _add(block, chosen, block.output, o.flatten(-2), block.attention_output_norm)
    return chosen


def add_mlp(block: Block, x: Tensor) -> None:
    """Add the MLP's contribution to x, [..., D], in place."""
    gate, up = _outputs(block.gate_up, _normed(block.mlp_norm, x), slice(0, 2))
    z = ops.gated_activation(gate, up, block.activation)
    _add(block, x, block.down, z, block.mlp_output_norm)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return norm(x) if norm else x


def _outputs(projections: Projections, x: Tensor, chosen: slice) -> tuple[Tensor, ...]:
    """The chosen outputs, by one product where the modules are plain and by calling them where they are not."""
    if not projections.plain():
        return projections(x)[chosen]
    return projections.product(x, x.dtype, chosen).split(projections.sizes[chosen], dim=-1)


def _beside(q: Tensor, k: Tensor) -> bool:
    """Whether k lies behind q in one product, so that both can be rotated at once."""
    return q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and (
        k.storage_offset() == q.storage_offset() + q.shape[-1] and k.stride() == q.stride()
    )


def _add(block: Block, x: Tensor, projections: Projections, y: Tensor, norm: Norm | None) -> None:
    (y,) = _outputs(projections, y, slice(0, 1))
    x.add_(norm(y) if norm else y, alpha=block.residual_scale)
