"""HunYuan's dense models: norms of queries and keys behind the rotation."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, mlp, rms_norms


def _read(layer: Any) -> Block:
    make, module = rms_norms(layer), layer.self_attn
    q_norm, k_norm = make(module, "query_layernorm"), make(module, "key_layernorm")
    norm = make(layer, "input_layernorm")
    return Block(
        attention(layer, norm, q_norm=q_norm, k_norm=k_norm, norm_behind_rotation=True),
        mlp(layer, make(layer, "post_attention_layernorm")),
    )


register_family("transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1DecoderLayer", _read)
