"""SmolLM 3: some layers do not rotate queries and keys."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import HALVES, llama_like


def _read(layer: Any) -> Block:
    attention = layer.self_attn
    return llama_like(layer, window=attention.sliding_window, rotary=HALVES if attention.use_rope else None)


register_family("transformers.models.smollm3.modeling_smollm3.SmolLM3DecoderLayer", _read)
