"""Qwen 2, and Qwen 3 with its norms of queries and keys."""

from __future__ import annotations

from cogsym.models.families import register_family
from cogsym.models.families.pieces import llama_like

_MODELS = "transformers.models."

register_family(
    f"{_MODELS}qwen2.modeling_qwen2.Qwen2DecoderLayer",
    lambda layer: llama_like(layer, window=layer.self_attn.sliding_window),
)
register_family(
    f"{_MODELS}qwen3.modeling_qwen3.Qwen3DecoderLayer",
    lambda layer: llama_like(layer, qk_norm="head", window=layer.self_attn.sliding_window),
)
