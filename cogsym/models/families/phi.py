"""Phi 3: queries, keys and values in one module, and gate and up in one."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import UnknownLayerError, register_family
from cogsym.models.families.pieces import llama_like


def _read(layer: Any) -> Block:
    config = layer.self_attn.config
    if config.resid_pdrop:
        raise UnknownLayerError(f"it drops out {config.resid_pdrop:.0%} of what it adds to the stream")
    return llama_like(layer, fused=True, window=config.sliding_window)


register_family("transformers.models.phi3.modeling_phi3.Phi3DecoderLayer", _read)
