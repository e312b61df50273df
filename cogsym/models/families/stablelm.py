"""StableLM: layer norms, and in some of its models both halves side by side behind one."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, layer_norms, mlp


def _read(layer: Any) -> Block:
    make, parallel = layer_norms(layer), layer.use_parallel_residual
    norm = make(layer, "input_layernorm")
    half = attention(layer, norm)
    if layer.self_attn.qk_layernorm:
        half = half.on_own_forward("the norms of its queries and keys are those of single heads")
    mlp_norm = norm if parallel else make(layer, "post_attention_layernorm")
    return Block(half, mlp(layer, mlp_norm), parallel, layer.dropout.p)


register_family("transformers.models.stablelm.modeling_stablelm.StableLmDecoderLayer", _read)
