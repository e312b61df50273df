"""Families whose MLP has no gate: Arcee, and with layer norms Jais 2, Nemotron and StarCoder 2."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import MakeNorm, attention, layer_norms, mlp, rms_norms

_MODELS = "transformers.models."


def _block(layer: Any, make: MakeNorm) -> Block:
    return Block(
        attention(layer, make(layer, "input_layernorm")),
        mlp(layer, make(layer, "post_attention_layernorm"), up=("up_proj",), gated=False),
    )


def _starcoder2(layer: Any) -> Block:
    make, config = layer_norms(layer), layer.self_attn.config
    norm, mlp_norm = make(layer, "input_layernorm"), make(layer, "post_attention_layernorm")
    return Block(
        attention(layer, norm, window=config.sliding_window),
        mlp(layer, mlp_norm, up=("c_fc",), gated=False, down="c_proj", activation="act"),
        dropout=config.residual_dropout,
    )


register_family(f"{_MODELS}arcee.modeling_arcee.ArceeDecoderLayer", lambda layer: _block(layer, rms_norms(layer)))
register_family(f"{_MODELS}jais2.modeling_jais2.Jais2DecoderLayer", lambda layer: _block(layer, layer_norms(layer)))
register_family(
    f"{_MODELS}nemotron.modeling_nemotron.NemotronDecoderLayer",
    lambda layer: _block(layer, layer_norms(layer, 1.0, "LayerNorm1P")),
)
register_family(f"{_MODELS}starcoder2.modeling_starcoder2.Starcoder2DecoderLayer", _starcoder2)
