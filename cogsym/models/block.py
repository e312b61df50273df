"""One decoder block: where its weights are and how it runs on our operations.

    h = x + Wo · attention(rotary(Wq n), rotary(Wk n), Wv n),   n = rms_norm(x)
    y = h + Wd · (act(Wg m) · Wu m),                            m = rms_norm(h)

with the biases and the query and key norms that a family has. A block holds references to the model's own modules and
reads them at each call: no weight is copied, and a module that is replaced (by peft, say) or hooked keeps working.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cogsym import ops
from cogsym.ops.gated_activation import Activation


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder layer of a Hugging Face model, described.

    Attributes:
        attention: the module that owns q_proj, k_proj, v_proj, o_proj, and q_norm, k_norm where `qk_norm`.
        mlp: the module that owns gate_proj, up_proj, down_proj.
        input_norm: the norm before attention.
        mlp_norm: the norm before the MLP.
        activation: the MLP's activation.
        qk_norm: queries and keys are normalised a head at a time, before the rotation.
        sliding_window: positions that a query sees, itself included; None sees all. The mask says so already; kernels
            that work without a mask need the number.
    """

    # Any: their submodules are reached by name.
    attention: Any
    mlp: Any
    input_norm: Any
    mlp_norm: Any
    activation: Activation
    qk_norm: bool
    sliding_window: int | None

    def bypassed(self) -> tuple[nn.Module, ...]:
        """Modules whose own forward this path does not call, so that a hook on them would not fire."""
        norms = (self.attention.q_norm, self.attention.k_norm) if self.qk_norm else ()
        return self.attention, self.mlp, self.mlp.act_fn, self.input_norm, self.mlp_norm, *norms

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any | None,
        **kwargs: Any,
    ) -> Tensor:
        """The block's output, [B, T, D] like `x`.

        Args:
            x: the residual stream, [B, T, D].
            attention_mask: as the model made it for its attention implementation.
            position_embeddings: cos and sin, [B or 1, T, R] each, their second half repeating the first.
            past_key_values: a transformers cache, updated in place, or None.
            kwargs: passed on to the attention implementation.
        """
        n = _norm(self.input_norm, x)
        q, k, v = self._queries_keys_values(n, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.attention.layer_idx)
        mixed = self._attend(q, k, v, attention_mask, **kwargs)
        norm = self.mlp_norm
        m, h = ops.rms_norm(self.attention.o_proj(mixed), norm.weight, norm.variance_epsilon, residual=x)
        gate, up = self.mlp.gate_proj(m), self.mlp.up_proj(m)
        return h + self.mlp.down_proj(ops.gated_activation(gate, up, self.activation))

    def _queries_keys_values(
        self, n: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: [B, heads, T, head_dim] each, transposed views."""
        attention = self.attention
        B, T, _ = n.shape
        q, k, v = (
            p(n).view(B, T, -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if self.qk_norm:
            q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
        cos, sin = (t[..., : t.shape[-1] // 2] for t in position_embeddings)
        q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Attention by the implementation the model was loaded with: [B, T, heads * head_dim]."""
        attention = self.attention
        # Only "eager" is not in the registry: each modeling file has its own.
        eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        dropout = attention.attention_dropout if attention.training else 0.0
        options = {"dropout": dropout, "scaling": attention.scaling, "sliding_window": self.sliding_window}
        mixed, _ = attend(attention, q, k, v, attention_mask, **options, **kwargs)
        return mixed.flatten(-2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return ops.rms_norm(x, norm.weight, norm.variance_epsilon)
