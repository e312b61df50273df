"""OLMo 2 and 3: norms behind the halves only, and of all heads' queries and keys together."""

from __future__ import annotations

from cogsym.models.families import register_family
from cogsym.models.families.pieces import llama_like

_MODELS = "transformers.models."
_NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

register_family(
    f"{_MODELS}olmo2.modeling_olmo2.Olmo2DecoderLayer",
    lambda layer: llama_like(layer, _NORMS, qk_norm="all"),
)
register_family(
    f"{_MODELS}olmo3.modeling_olmo3.Olmo3DecoderLayer",
    lambda layer: llama_like(layer, _NORMS, qk_norm="all", window=layer.self_attn.sliding_window),
)
