"""EXAONE 4: norms behind the halves only; where some layers see a window, the others rotate nothing."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import HALVES, llama_like

_NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _read(layer: Any) -> Block:
    module = layer.self_attn
    window = module.sliding_window if module.is_sliding else None
    rotary = HALVES if module.is_sliding or module.sliding_window is None else None
    return llama_like(layer, _NORMS, qk_norm="head", window=window, rotary=rotary)


register_family("transformers.models.exaone4.modeling_exaone4.Exaone4DecoderLayer", _read)
