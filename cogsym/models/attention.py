"""The attention of a decoder block.

    f(n) = Wo · attention(rotary(norm(Wq n)), rotary(norm(Wk n)), Wv n)

Queries, keys and values may be those of many sequences and of many states of each; where the caller passes `attend`,
which keys a query sees is the caller's affair. From the gradient of f, do = df Wo; dq, dk, dv from do, q, k, v, o and
lse; they are rotated back and led through the norms of queries and keys; dn = [dq; dk; dv] · Wqkv is one product. With
o and lse kept, attention is never computed again. Some families gate what attention gives (Qwen3-Next):

    f(n) = Wo · (sigmoid(gate) · attention(...)),  [Wq n]_h = [q_h; gate_h] for each head h
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cogsym import ops
from cogsym.models.half import Dial, Half, Kept, Product
from cogsym.models.inputs import LayerInputs, Positions, QueryScale, Rotary
from cogsym.models.masks import UnknownMaskError, visible_keys
from cogsym.models.norm import Norm
from cogsym.models.projections import Projections, compute_dtype
from cogsym.ops import AttentionOptions
from cogsym.ops.attention import attention_pairs

# (q [B, T, H, d], k [B, S, KV, d], v like k) -> o [B, T, H, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Attention implementations of transformers that compute exactly what a mask says, and so may be replaced by ours.
_PLAIN_ATTENTION = ("sdpa", "eager")
_KEYS_VALUES = slice(1, 3)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionHalf(Half):
    """Attention on our operations.

    Attributes:
        qkv: queries, keys and values.
        gated: a head's gate lies behind its queries.
        output: the projection back (one name).
        head_dim: d.
        q_norm: norm of the queries, or None.
        k_norm: norm of the keys, or None.
        normed_rows: what they take as a row: a "head", or "all" heads together.
        norm_behind_rotation: they stand behind the rotation, not before it.
        rotary: how queries and keys are rotated, or None.
        query_scale: how queries grow with their position, or None.
        options: of `cogsym.ops.attention`, without `starts`.
        sinks: the module's attribute with a logit for each head that takes part in its softmax; "" for none.
    """

    qkv: Projections
    gated: bool = False
    output: Projections
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    normed_rows: Literal["head", "all"] = "head"
    norm_behind_rotation: bool = False
    rotary: Rotary | None
    query_scale: QueryScale | None = None
    options: AttentionOptions
    sinks: str = ""

    def foreign(self, training: bool) -> str | None:
        """Why attention must be computed by the model's own implementation whatever the mask, or None."""
        implementation = self.module.config._attn_implementation
        if implementation not in _PLAIN_ATTENTION:
            return f"the model was loaded with {implementation} attention"
        return "attention dropout is on" if training and self.dropout else None

    @property
    def query_features(self) -> int:
        """Features of all heads' queries together."""
        return self.qkv.sizes[0] // (2 if self.gated else 1)

    @property
    def dropout(self) -> float:
        """Share of attention's probabilities that are dropped in training."""
        rate = getattr(self.module, "attention_dropout", 0.0)
        return float(rate.p if isinstance(rate, nn.Dropout) else rate)

    def positions(self, inputs: LayerInputs, x: Tensor, training: bool) -> Positions:
        """Where the tokens stand.

        Args:
            inputs: the layer's keywords.
            x: the residual stream, or anything [B, T, ...] on its device.
            training: dropout is on.

        Raises:
            UnknownMaskError: this attention must be computed by the model's own implementation.
        """
        if reason := self.foreign(training):
            raise UnknownMaskError(reason)
        visible = visible_keys(inputs.attention_mask, x.shape[1])
        starts = None if visible.starts is None else visible.starts.expand(x.shape[0], -1)
        scale = self.query_scale
        factors = scale.where_needed(inputs.keywords["position_ids"]) if scale else None
        return Positions(*self._tables(inputs), starts, visible.blind, factors)

    def forward(self, n: Tensor, inputs: LayerInputs) -> Tensor:
        """See `Half`. Without `inputs.positions` the model's own implementation attends, with its cache."""
        where, raw = inputs.positions, self.qkv(n)
        if where is None:
            q, k, v = self.heads(raw, *self._tables(inputs))
            if self.query_scale:
                q = scaled(q, self.query_scale(inputs.keywords["position_ids"]))
            return self._project(self._attend(q, k, v, inputs), raw[0])
        q, k, v = self.heads(raw, where.cos, where.sin)
        o, _ = ops.attention(scaled(q, where.query_scale), k, v, self.at(where.starts))
        return self._project(o if where.blind is None else o.masked_fill(where.blind, 0), raw[0])

    def run(self, n: Tensor, inputs: LayerInputs, kept: Kept) -> Tensor:
        """See `Half`."""
        self._mix(n, inputs, kept)
        o = self._through_gate(kept["o"], kept["qkv"])
        kept[self.PROJECTED] = projected = self.output.product(o.flatten(-2), compute_dtype(n))
        return projected

    def recall(self, n: Tensor, inputs: LayerInputs, kept: Kept, need_projected: bool) -> Tensor | None:
        """See `Half`."""
        if need_projected or self.output_norm:
            return self.run(n, inputs, kept)
        self._mix(n, inputs, kept)
        return None

    def input_gradient(self, dprojected: Tensor, n: Callable[[], Tensor], inputs: LayerInputs, kept: Kept) -> Tensor:
        """See `Half`."""
        where = inputs.positions
        assert where is not None
        if "qkv" not in kept:
            value = n()
            kept["qkv"] = self.qkv.product(value, compute_dtype(value))
        qkv, o, lse = kept.pop("qkv"), kept.pop("o"), kept.pop("lse")
        do = self.output.input_gradient(dprojected.to(qkv.dtype)).view(o.shape)
        if where.blind is not None:
            do = do.masked_fill(where.blind, 0)
        raw = qkv.split(self.qkv.sizes, dim=-1)
        do, dgate = self._through_gate_backward(do, o, raw[0])
        q, k, v = self.heads(raw, where.cos, where.sin)
        q = scaled(q, where.query_scale)
        dq, dk, dv = ops.attention_gradients(do, q, k, v, o, lse, self.at(where.starts))
        del q, k, v, o, do
        dq = self._raw_gradient(scaled(dq, where.query_scale), self._queries(raw[0]), self.q_norm, where)
        if dgate is not None:
            dq = torch.cat([dq, dgate], dim=-1)
        dk = self._raw_gradient(dk, raw[1], self.k_norm, where)
        return self.qkv.input_gradient(torch.cat([t.flatten(-2) for t in (dq, dk, dv)], dim=-1))

    def attended(self, n: Tensor, cos: Tensor | None, sin: Tensor | None, attend: Attend) -> Tensor:
        """What f gives with the attention that is passed."""
        raw = self.qkv(n)
        return self._project(attend(*self.heads(raw, cos, sin)), raw[0])

    def attended_at(self, n: Tensor, rows: Tensor, cos: Tensor | None, sin: Tensor | None, attend: Attend) -> Tensor:
        """As `attended` at some positions only, [B, P, D]; keys and values are those of all.

        Args:
            n: [B, T, D].
            rows: the positions, int64 [P].
            cos: [B or 1, T, R/2].
            sin: like `cos`.
            attend: attention of the chosen queries to all keys.
        """
        at = (None, None) if cos is None or sin is None else (cos[:, rows], sin[:, rows])
        (raw,) = self.qkv(n[:, rows], slice(0, 1))
        k, v = self.qkv(n, _KEYS_VALUES)
        q, k = self._placed(self._queries(raw), self.q_norm, *at), self._placed(k, self.k_norm, cos, sin)
        return self._project(attend(q, k, v.unflatten(-1, k.shape[-2:])), raw)

    def heads(self, qkv: tuple[Tensor, ...], cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them: normed, rotated, [B, T, heads, head_dim] each."""
        q, k, v = self._queries(qkv[0]), *qkv[1:]
        v = v.unflatten(-1, (-1, self.head_dim))
        if self.q_norm is None and self.rotary and not q.requires_grad and _beside(q, k):
            both = q.as_strided((*q.shape[:-1], q.shape[-1] + k.shape[-1]), q.stride(), q.storage_offset())
            q, k = self._placed(both, None, cos, sin).tensor_split([q.shape[-1] // self.head_dim], dim=-2)
            return q, k, v
        return self._placed(q, self.q_norm, cos, sin), self._placed(k, self.k_norm, cos, sin), v

    def at(self, starts: Tensor | None) -> AttentionOptions:
        """The options for queries that see keys from `starts` on, int32 [B, T]; None for the first of all."""
        it = self.options
        return AttentionOptions(it.scale, starts, it.window, it.soft_cap, self._sink_logits())

    def in_ranges(self) -> AttentionOptions:
        """The options for queries whose keys are given as ranges, the sliding window's ends among them."""
        it = self.options
        return AttentionOptions(it.scale, soft_cap=it.soft_cap, sinks=self._sink_logits())

    def kept(self, dial: Dial) -> tuple[str, ...]:
        """See `Half`."""
        mixed = ("o", "lse", *((self.PROJECTED,) if self.output_norm else ()))
        return {"all": ("qkv", *mixed), "attention": mixed, "input": ()}[dial]

    def kept_bytes(self, dial: Dial, element_size: int) -> int:
        """See `Half`; the logarithm of a query's sum of exponentials has 4 bytes (8 in float64)."""
        if dial == "input":
            return 0
        queries = self.query_features
        qkv = element_size * sum(self.qkv.sizes) if dial == "all" else 0
        lse = max(4, element_size) * queries // self.head_dim
        return qkv + element_size * queries + lse + super().kept_bytes(dial, element_size)

    def products(self, rows: int) -> list[Product]:
        """See `Half`."""
        return [
            Product("qkv", rows, self.width, sum(self.qkv.sizes), True),
            Product("output", rows, self.query_features, self.width, False),
        ]

    def mixing_flops(self, length: int) -> int:
        """See `Half`."""
        return 4 * self.query_features * attention_pairs(length, self.options.window)

    def repeated(self, dial: Dial, need_projected: bool) -> set[str]:
        """See `Half`."""
        if dial != "input":
            return {"qkv"} if dial == "attention" else set()
        return {"qkv", "mixing"} | ({"output"} if need_projected or self.output_norm else set())

    def projections(self) -> tuple[Projections, ...]:
        """See `Half`."""
        return self.qkv, self.output

    def operations(self) -> dict[str, dict[str, Any]]:
        """See `Half`."""
        it = self.options
        facts = {"head_dim": self.head_dim, "window": it.window, "soft_cap": it.soft_cap}
        return {"attention": facts} | ({"rotary": {}} if self.rotary else {})

    def bypassed(self) -> list[nn.Module]:
        """See `Half`."""
        return [self.module, *(norm.module for norm in (self.q_norm, self.k_norm) if norm)]

    def lacks(self, kept: Kept) -> bool:
        """See `Half`."""
        return "o" not in kept or super().lacks(kept)

    @staticmethod
    def call_own(module: Any, n: Tensor, inputs: LayerInputs) -> Tensor:
        """See `Half`."""
        y = module(hidden_states=n, **inputs.keywords)
        return y[0] if isinstance(y, tuple) else y

    def _tables(self, inputs: LayerInputs) -> tuple[Tensor | None, Tensor | None]:
        if self.rotary is None:
            return None, None
        assert inputs.position_embeddings is not None
        return self.rotary.tables(inputs.position_embeddings)

    def _sink_logits(self) -> Tensor | None:
        return getattr(self.module, self.sinks) if self.sinks else None

    def _mix(self, n: Tensor, inputs: LayerInputs, kept: Kept) -> None:
        """qkv, o and lse."""
        where = inputs.positions
        assert where is not None
        kept["qkv"] = qkv = self.qkv.product(n, compute_dtype(n))
        q, k, v = self.heads(qkv.split(self.qkv.sizes, dim=-1), where.cos, where.sin)
        kept["o"], kept["lse"] = ops.attention(scaled(q, where.query_scale), k, v, self.at(where.starts))
        if where.blind is not None:
            kept["o"].masked_fill_(where.blind, 0)

    def _project(self, o: Tensor, raw: Tensor) -> Tensor:
        """f, of what attention gives and what the first projection gave."""
        return self.output(self._through_gate(o, raw).flatten(-2))[0]

    def _queries(self, raw: Tensor) -> Tensor:
        """The queries in what their projection gave, [B, T, features]."""
        return raw.unflatten(-1, (-1, 2, self.head_dim))[..., 0, :].flatten(-2) if self.gated else raw

    def _gate(self, raw: Tensor) -> Tensor:
        """What o is multiplied by, [B, T, heads, head_dim]; `raw` may have more features behind the queries'."""
        queries = raw[..., : self.qkv.sizes[0]]
        return queries.unflatten(-1, (-1, 2, self.head_dim))[..., 1, :].sigmoid()

    def _through_gate(self, o: Tensor, raw: Tensor) -> Tensor:
        return o * self._gate(raw) if self.gated else o

    def _through_gate_backward(self, do: Tensor, o: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of o and of what the gate's sigmoid takes, [B, T, heads, head_dim] each."""
        if not self.gated:
            return do, None
        gate = self._gate(raw)
        return do * gate, do * o * gate * (1 - gate)

    def _placed(self, x: Tensor, norm: Norm | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Queries or keys as attention takes them, [B, T, heads, head_dim]."""
        if norm and self.normed_rows == "all":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        of_heads = norm if self.normed_rows == "head" else None
        if of_heads and not self.norm_behind_rotation:
            x = of_heads(x)
        if self.rotary and cos is not None and sin is not None:
            x = ops.rotary(x, cos, sin, interleaved=self.rotary.interleaved)
        return of_heads(x) if of_heads and self.norm_behind_rotation else x

    def _raw_gradient(self, d: Tensor, raw: Tensor, norm: Norm | None, where: Positions) -> Tensor:
        """The gradient of `raw`, what the product gave, from that of `_placed`, [B, T, heads, head_dim] each."""
        raw = raw.unflatten(-1, (-1, self.head_dim))
        if norm and self.norm_behind_rotation:
            d = norm.input_gradient(d, self._placed(raw.flatten(-2), None, where.cos, where.sin))
        if self.rotary and where.cos is not None and where.sin is not None:
            d = ops.rotary(d, where.cos, where.sin, interleaved=self.rotary.interleaved, inverse=True)
        if norm is None or self.norm_behind_rotation:
            return d
        if self.normed_rows == "head":
            return norm.input_gradient(d, raw)
        return norm.input_gradient(d.flatten(-2), raw.flatten(-2)).unflatten(-1, (-1, self.head_dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: LayerInputs) -> Tensor:
        """Attention by the model's implementation, [B, T, heads, head_dim]."""
        module = self.module
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if inputs.cache is not None:
            k, v = inputs.cache.update(k, v, module.layer_idx)
        # Only "eager" is not in the registry: each modeling file has its own.
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
        options: dict[str, Any] = {"scaling": self.options.scale, "sliding_window": self.options.window}
        if self.options.soft_cap is not None:
            options["softcap"] = self.options.soft_cap
        if self.sinks:
            options["s_aux"] = self._sink_logits()
        rest = {
            name: value
            for name, value in inputs.keywords.items()
            if name not in ("attention_mask", "position_embeddings", "past_key_values")
        }
        dropout = self.dropout if module.training else 0.0
        o: Tensor = attend(module, q, k, v, inputs.attention_mask, dropout=dropout, **options, **rest)[0]
        return o


def scaled(q: Tensor, factors: Tensor | None) -> Tensor:
    """Queries, [B, T, H, d], times factors of `QueryScale`."""
    return q if factors is None else q * factors.to(q.dtype)


def _beside(q: Tensor, k: Tensor) -> bool:
    """Whether k lies behind q in one product, so that both can be rotated at once."""
    if torch.compiler.is_compiling() or k.requires_grad:
        return False
    return q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() and (
        k.storage_offset() == q.storage_offset() + q.shape[-1] and k.stride() == q.stride()
    )
