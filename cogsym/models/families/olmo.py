"""OLMo 2: norms behind the halves only, and of all heads' queries and keys together."""

from __future__ import annotations

from cogsym.models.families import register_family
from cogsym.models.families.pieces import llama_like

_NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

register_family(
    "transformers.models.olmo2.modeling_olmo2.Olmo2DecoderLayer",
    lambda layer: llama_like(layer, _NORMS, qk_norm="all"),
)
