"""Phi: both halves side by side behind one layer norm, no gate. Phi 3: Llama's layer with its projections in two
modules."""

from __future__ import annotations

from typing import Any

from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, layer_norms, llama_like, mlp

_MODELS = "transformers.models."


def _phi(layer: Any) -> Block:
    make, module = layer_norms(layer), layer.self_attn
    norm = make(layer, "input_layernorm")
    q_norm, k_norm = (make(module, name if module.qk_layernorm else None) for name in ("q_layernorm", "k_layernorm"))
    return Block(
        attention(layer, norm, output="dense", q_norm=q_norm, k_norm=k_norm),
        mlp(layer, norm, up=("fc1",), gated=False, down="fc2", activation="activation_fn"),
        parallel=True,
        dropout=layer.resid_dropout.p,
    )


def _phi3(layer: Any) -> Block:
    config = layer.self_attn.config
    return llama_like(layer, fused=True, window=config.sliding_window, dropout=config.resid_pdrop)


register_family(f"{_MODELS}phi.modeling_phi.PhiDecoderLayer", _phi)
register_family(f"{_MODELS}phi3.modeling_phi3.Phi3DecoderLayer", _phi3)
