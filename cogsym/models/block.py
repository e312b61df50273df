"""One decoder block: where its weights are, and how it runs on our operations.

    h = x + c · norm'(Wo · attention(rotary(Wq n), rotary(Wk n), Wv n)),   n = norm(x)
    y = h + c · norm'(Wd · (act(Wg m) · Wu m)),                            m = norm(h)

Llama has the norms before the products, OLMo 2 those after them, Gemma both; c is Granite's, 1 elsewhere. A block holds
references to the model's own modules and reads them at each call: no weight is copied, and a module that is replaced
(by peft, say) or hooked keeps working.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cogsym import ops
from cogsym.models.masks import UnknownMaskError, visible_keys
from cogsym.models.projections import Projections
from cogsym.ops.activation import Activation

# Attention implementations of transformers that compute exactly what a mask says, and so may be replaced by ours.
_PLAIN_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True, eq=False)
class Norm:
    """A root-mean-square norm of the model.

    Attributes:
        owner: the module that it is an attribute of.
        name: the attribute's name.
        offset: added to its weight: 1 for Gemma.
    """

    owner: Any
    name: str
    offset: float

    @property
    def module(self) -> Any:
        """The module, as it is now."""
        return getattr(self.owner, self.name)

    def __call__(self, x: Tensor) -> Tensor:
        """x normalised."""
        return ops.rms_norm(x, self.module.weight, self._eps(), offset=self.offset)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, sum)."""
        return ops.rms_norm(x, self.module.weight, self._eps(), residual=residual, offset=self.offset)

    def input_gradient(self, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """The gradient for x, with `dx`, which reaches it by another way, added."""
        return ops.rms_norm_input_gradient(dy, x, self.module.weight, self._eps(), offset=self.offset, dh=dx)

    def _eps(self) -> float:
        module = self.module
        return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a batch stand; the layers of a forward pass share it.

    Attributes:
        cos: [B or 1, T, R/2], one column a rotated pair.
        sin: like `cos`.
        starts: the first key that each query sees, int32 [B, T]; None for the first of all.
        blind: queries whose attention is 0, bool [B or 1, T, 1, 1]; None where there are none.
    """

    cos: Tensor
    sin: Tensor
    starts: Tensor | None
    blind: Tensor | None


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder layer of a Hugging Face model, described.

    Attributes:
        attention: the module of the attention.
        mlp: the module of the gated MLP.
        qkv: its queries, keys and values.
        output: its output projection (one name).
        gate_up: the MLP's gate and up.
        down: the MLP's down projection (one name).
        attention_norm: the norm before attention, or None.
        attention_output_norm: the norm of what attention adds to the stream, or None.
        mlp_norm: the norm before the MLP, or None.
        mlp_output_norm: the norm of what the MLP adds to the stream, or None.
        q_norm: norm of the queries, or None.
        k_norm: norm of the keys, or None.
        normed: what `q_norm` and `k_norm` take as a row: a "head", or "all" heads together.
        activation: the MLP's activation.
        scale: factor of the products of queries and keys.
        soft_cap: bound of the attention's logits, or None.
        sliding_window: positions that a query sees, itself included; None for all.
        rotated: queries and keys are rotated by their position.
        residual_scale: factor of what is added to the stream.
    """

    # Any: their submodules are reached by name.
    attention: Any
    mlp: Any
    qkv: Projections
    output: Projections
    gate_up: Projections
    down: Projections
    attention_norm: Norm | None
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp_output_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    normed: Literal["head", "all"]
    activation: Activation
    scale: float
    soft_cap: float | None
    sliding_window: int | None
    rotated: bool
    residual_scale: float

    def norms(self) -> list[Norm]:
        """Every norm there is."""
        candidates = (
            self.attention_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm, self.q_norm,
            self.k_norm,
        )  # fmt: skip
        return [norm for norm in candidates if norm is not None]

    def projections(self) -> tuple[Projections, ...]:
        """The linear maps, in the order of the forward pass."""
        return self.qkv, self.output, self.gate_up, self.down

    def bypassed(self) -> list[nn.Module]:
        """Modules whose own forward this path does not call, so that a hook on them would not fire."""
        activation = getattr(self.mlp, "act_fn", None) or self.mlp.activation_fn
        return [self.attention, self.mlp, activation, *(norm.module for norm in self.norms())]

    def foreign_attention(self, training: bool) -> str | None:
        """Why attention must be computed by the model's own implementation whatever the mask, or None."""
        implementation = self.attention.config._attn_implementation
        if implementation not in _PLAIN_ATTENTION:
            return f"the model was loaded with {implementation} attention"
        return "attention dropout is on" if training and self.attention.attention_dropout else None

    def positions(
        self, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any, x: Tensor, training: bool
    ) -> Positions:
        """What our attention needs to know of a batch.

        Args:
            position_embeddings: cos and sin, [B or 1, T, R] each, their second half repeating the first.
            attention_mask: as the model made it for its attention implementation.
            x: the residual stream, or anything [B, T, ...] on its device.
            training: dropout is on.

        Raises:
            UnknownMaskError: this attention must be computed by the model's own implementation.
        """
        if reason := self.foreign_attention(training):
            raise UnknownMaskError(reason)
        cos, sin = (t[..., : t.shape[-1] // 2] for t in position_embeddings)
        visible = visible_keys(attention_mask, x.shape[1])
        starts = None if visible.starts is None else visible.starts.expand(x.shape[0], -1)
        return Positions(cos, sin, starts, visible.blind)

    def forward(
        self,
        x: Tensor,
        attention_mask: Any,
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
        q, k, v = self.qkv(self.attention_norm(x) if self.attention_norm else x)
        cos, sin = (t[..., : t.shape[-1] // 2] for t in position_embeddings)
        q, k, v = self.heads(q, k, v, cos, sin)
        mixed = self._attend(q, k, v, attention_mask, position_embeddings, past_key_values, **kwargs)
        added = self._added(self.output(mixed.flatten(-2))[0], self.attention_output_norm)
        m, h = self.mlp_norm.after_adding(added, x) if self.mlp_norm else (added + x,) * 2
        gate, up = self.gate_up(m)
        z = ops.gated_activation(gate, up, self.activation)
        return h + self._added(self.down(z)[0], self.mlp_output_norm)

    def heads(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them: normed, rotated, [B, T, heads, head_dim] each."""
        q, k = self.rotate(q, self.q_norm, cos, sin), self.rotate(k, self.k_norm, cos, sin)
        return q, k, v.unflatten(-1, (-1, self.attention.head_dim))

    def rotate(self, x: Tensor, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries with `q_norm`, or keys with `k_norm`, as attention takes them, [B, T, heads, head_dim]."""
        x = norm(x) if norm and self.normed == "all" else x
        x = x.unflatten(-1, (-1, self.attention.head_dim))
        x = norm(x) if norm and self.normed == "head" else x
        return ops.rotary(x, cos, sin) if self.rotated else x

    def attention_options(self, positions: Positions) -> ops.AttentionOptions:
        """What `ops.attention` is told of a batch."""
        return ops.AttentionOptions(self.scale, positions.starts, self.sliding_window, self.soft_cap)

    def _added(self, x: Tensor, norm: Norm | None) -> Tensor:
        """What is added to the stream."""
        x = norm(x) if norm else x
        return x if self.residual_scale == 1 else x * self.residual_scale

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Any,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any | None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention, [B, T, heads, head_dim]: ours where it can be, else the model's implementation."""
        attention = self.attention
        if past_key_values is None:
            try:
                where = self.positions(position_embeddings, attention_mask, q, attention.training)
            except UnknownMaskError:
                pass
            else:
                o, _ = ops.attention(q, k, v, self.attention_options(where))
                return o if where.blind is None else o.masked_fill(where.blind, 0)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        # Only "eager" is not in the registry: each modeling file has its own.
        eager: Any = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        options: dict[str, Any] = {"scaling": self.scale, "sliding_window": self.sliding_window}
        if self.soft_cap is not None:
            options["softcap"] = self.soft_cap
        dropout = attention.attention_dropout if attention.training else 0.0
        return attend(attention, q, k, v, attention_mask, dropout=dropout, **options, **kwargs)[0]
