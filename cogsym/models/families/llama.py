"""Llama and the families whose layer is Llama's to the letter, or but for a window, a rotation or a factor."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import Logits, register_family
from cogsym.models.families.pieces import NEIGHBOURS, llama_like
from cogsym.models.inputs import QueryScale

_MODELS = "transformers.models."


def _windowed(layer: Any) -> Block:
    """The sliding window is the config's for every layer."""
    return llama_like(layer, window=layer.self_attn.config.sliding_window)


def _windowed_by_layer(layer: Any) -> Block:
    return llama_like(layer, window=layer.self_attn.sliding_window)


def _ministral3(layer: Any) -> Block:
    config = layer.self_attn.config
    rope = config.rope_parameters
    scale = QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    return llama_like(layer, window=config.sliding_window, query_scale=scale)


def _hyperclovax(layer: Any) -> Block:
    behind = ("post_norm1", "post_norm2") if layer.self_attn.config.use_post_norm else (None, None)
    norms = ("input_layernorm", behind[0], "post_attention_layernorm", behind[1])
    return llama_like(layer, norms, residual_scale=layer.residual_multiplier)


register_family(f"{_MODELS}llama.modeling_llama.LlamaDecoderLayer", llama_like)
register_family(f"{_MODELS}mistral.modeling_mistral.MistralDecoderLayer", _windowed)
register_family(f"{_MODELS}ministral.modeling_ministral.MinistralDecoderLayer", _windowed_by_layer)
register_family(f"{_MODELS}ministral3.modeling_ministral3.Ministral3DecoderLayer", _ministral3)
register_family(f"{_MODELS}cwm.modeling_cwm.CwmDecoderLayer", _windowed_by_layer)
register_family(
    f"{_MODELS}helium.modeling_helium.HeliumDecoderLayer", lambda layer: llama_like(layer, rotary=NEIGHBOURS)
)
register_family(
    f"{_MODELS}ernie4_5.modeling_ernie4_5.Ernie4_5DecoderLayer", lambda layer: llama_like(layer, rotary=NEIGHBOURS)
)
register_family(
    f"{_MODELS}seed_oss.modeling_seed_oss.SeedOssDecoderLayer",
    lambda layer: llama_like(layer, dropout=layer.mlp.residual_dropout),
)
register_family(
    f"{_MODELS}granite.modeling_granite.GraniteDecoderLayer",
    lambda layer: llama_like(layer, residual_scale=layer.residual_multiplier),
    logits=lambda config: Logits(scale=1 / config.logits_scaling),
)
register_family(
    f"{_MODELS}hyperclovax.modeling_hyperclovax.HyperCLOVAXDecoderLayer",
    _hyperclovax,
    logits=lambda config: Logits(scale=config.logits_scaling),
)
