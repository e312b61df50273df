"""Qwen3-Next and Qwen3.5: most layers have linear attention (a gated delta net), the others gate what theirs gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, experts, rms_norms
from cogsym.models.half import Half, OwnHalf
from cogsym.models.inputs import LayerInputs
from cogsym.models.norm import Norm

_MODELS = "transformers.models."


def _read(layer: Any) -> Block:
    make = rms_norms(layer, offset=1.0)
    norm = make(layer, "input_layernorm")
    if layer.block_type == "full_attention":
        module = layer.self_attn
        mixer = attention(layer, norm, gated=True, q_norm=make(module, "q_norm"), k_norm=make(module, "k_norm"))
    else:
        mixer = _delta_net(layer, norm)
    return Block(mixer, experts(layer, make(layer, "post_attention_layernorm")))


def _delta_net(layer: Any, norm: Norm | None) -> Half:
    return OwnHalf(
        owner=layer,
        name="linear_attn",
        norm=norm,
        width=layer.hidden_size,
        reason="its attention is linear",
        call=_call,
    )


def _call(module: Any, n: Tensor, inputs: LayerInputs) -> Tensor:
    named = ("attention_mask", "past_key_values", "position_embeddings", "position_ids")
    rest = {name: value for name, value in inputs.keywords.items() if name not in named}
    y: Tensor = module(hidden_states=n, cache_params=inputs.cache, attention_mask=inputs.attention_mask, **rest)
    return y


register_family(f"{_MODELS}qwen3_next.modeling_qwen3_next.Qwen3NextDecoderLayer", _read)
register_family(f"{_MODELS}qwen3_5.modeling_qwen3_5.Qwen3_5DecoderLayer", _read)
register_family(f"{_MODELS}qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeDecoderLayer", _read)
