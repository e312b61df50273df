"""Mixtures of experts: attention as in their dense relations, the experts by their own forward."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, experts, rms_norms

_MODELS = "transformers.models."


def _read(layer: Any, qk_norm: bool = False, window: int | None = None) -> Block:
    make, names = rms_norms(layer), ("q_norm", "k_norm") if qk_norm else (None, None)
    q_norm, k_norm = (make(layer.self_attn, name) for name in names)
    return Block(
        attention(layer, make(layer, "input_layernorm"), q_norm=q_norm, k_norm=k_norm, window=window),
        experts(layer, make(layer, "post_attention_layernorm")),
    )


register_family(
    f"{_MODELS}mixtral.modeling_mixtral.MixtralDecoderLayer",
    lambda layer: _read(layer, window=layer.self_attn.config.sliding_window),
)
register_family(
    f"{_MODELS}qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer",
    lambda layer: _read(layer, window=getattr(layer.self_attn, "sliding_window", None)),
)
register_family(
    f"{_MODELS}qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer",
    lambda layer: _read(layer, qk_norm=True, window=layer.self_attn.sliding_window),
)
