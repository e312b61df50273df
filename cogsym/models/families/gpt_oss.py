"""gpt-oss: each head has a learned logit in its softmax, half of the layers a window, and the experts are routed."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, experts, rms_norms
from cogsym.models.inputs import Rotary


def _read(layer: Any) -> Block:
    make = rms_norms(layer)
    return Block(
        attention(
            layer, make(layer, "input_layernorm"), rotary=Rotary(repeated="once"),
            window=layer.self_attn.sliding_window, sinks="sinks",
        ),
        experts(layer, make(layer, "post_attention_layernorm"), "MLP"),
    )  # fmt: skip


register_family("transformers.models.gpt_oss.modeling_gpt_oss.GptOssDecoderLayer", _read)
