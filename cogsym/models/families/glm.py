"""GLM and GLM 4: neighbours are rotated together, not all of a head; gate and up in one module.

GLM 4 has norms behind the halves too.
"""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import NEIGHBOURS, attention, mlp, rms_norms

_MODELS = "transformers.models."


def _block(layer: Any, behind: str | None = None, behind_mlp: str | None = None) -> Block:
    make = rms_norms(layer)
    return Block(
        attention(layer, make(layer, "input_layernorm"), make(layer, behind), rotary=NEIGHBOURS),
        mlp(
            layer, make(layer, "post_attention_layernorm"), make(layer, behind_mlp), up=("gate_up_proj",),
            activation="activation_fn",
        ),
    )  # fmt: skip


register_family(f"{_MODELS}glm.modeling_glm.GlmDecoderLayer", _block)
register_family(
    f"{_MODELS}glm4.modeling_glm4.Glm4DecoderLayer",
    lambda layer: _block(layer, "post_self_attn_layernorm", "post_mlp_layernorm"),
)
