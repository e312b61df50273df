"""Llama and the families whose layer is Llama's to the letter, or but for a sliding window."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import Logits, register_family
from cogsym.models.families.pieces import llama_like

_MODELS = "transformers.models."


def _windowed(layer: Any) -> Block:
    """The sliding window is the config's for every layer."""
    return llama_like(layer, window=layer.self_attn.config.sliding_window)


register_family(f"{_MODELS}llama.modeling_llama.LlamaDecoderLayer", llama_like)
register_family(f"{_MODELS}mistral.modeling_mistral.MistralDecoderLayer", _windowed)
register_family(
    f"{_MODELS}granite.modeling_granite.GraniteDecoderLayer",
    lambda layer: llama_like(layer, residual_scale=layer.residual_multiplier),
    logits=lambda config: Logits(scale=1 / config.logits_scaling),
)
