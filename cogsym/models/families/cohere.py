"""Cohere, Aya among it: one norm for both halves, which stand side by side; neighbours are rotated together."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import Logits, register_family
from cogsym.models.families.pieces import attention, layer_norms, mlp
from cogsym.models.inputs import Rotary

_MODELS = "transformers.models."
_PAIRS = Rotary(interleaved=True, repeated="pairs")


def _cohere(layer: Any) -> Block:
    norm = layer_norms(layer, name="LayerNorm")(layer, "input_layernorm")
    half = attention(layer, norm, rotary=_PAIRS)
    if layer.self_attn.use_qk_norm:
        half = half.on_own_forward("the norms of its queries and keys have a weight for each head")
    return Block(half, mlp(layer, norm), parallel=True)


def _cohere2(layer: Any) -> Block:
    """Layers that see all tokens rotate nothing."""
    norm, window = layer_norms(layer, name="LayerNorm")(layer, "input_layernorm"), layer.self_attn.sliding_window
    half = attention(layer, norm, rotary=_PAIRS if window else None, window=window)
    return Block(half, mlp(layer, norm), parallel=True)


def _logits(config: Any) -> Logits:
    return Logits(scale=config.logit_scale)


register_family(f"{_MODELS}cohere.modeling_cohere.CohereDecoderLayer", _cohere, logits=_logits)
register_family(f"{_MODELS}cohere2.modeling_cohere2.Cohere2DecoderLayer", _cohere2, logits=_logits)
