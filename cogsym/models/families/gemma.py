"""Gemma: 1 added to the norms' weights; Gemma 2 and 3: norms behind each half too, soft caps, norms of q and k."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import Logits, register_family
from cogsym.models.families.pieces import llama_like

_MODELS = "transformers.models."
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _gemma2(layer: Any) -> Block:
    attention = layer.self_attn
    cap, window = attention.attn_logit_softcapping, attention.sliding_window
    return llama_like(layer, _NORMS, offset=1.0, soft_cap=cap, window=window)


def _gemma3(layer: Any) -> Block:
    return llama_like(layer, _NORMS, offset=1.0, qk_norm="head", window=layer.self_attn.sliding_window)


def _logits(config: Any) -> Logits:
    return Logits(soft_cap=config.final_logit_softcapping)


register_family(f"{_MODELS}gemma.modeling_gemma.GemmaDecoderLayer", lambda layer: llama_like(layer, offset=1.0))
register_family(f"{_MODELS}gemma2.modeling_gemma2.Gemma2DecoderLayer", _gemma2, logits=_logits)
register_family(f"{_MODELS}gemma3.modeling_gemma3.Gemma3DecoderLayer", _gemma3, logits=_logits)
