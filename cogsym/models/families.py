"""Which Hugging Face decoder layers are read into a `Block`, and how.

A family is known by its layer's class, never by a model's name: a subclass, a layer from remote code or one whose
forward another library has replaced may compute something else, and runs its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from cogsym.models.block import Block, Norm
from cogsym.models.projections import Projections
from cogsym.ops.activation import Activation

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What distinguishes one family's decoder layer from Llama's.

    Attributes:
        norms: the layer's norms before attention, after it, before the MLP, after it; None where there is none.
        norm_offset: added to the norms' weights.
        qk_norm: queries and keys are normed a "head" at a time, "all" heads together, or not.
        soft_cap: the attention's logits are bounded by `attn_logit_softcapping`.
        fused: queries, keys and values are one module, and so are gate and up.
        window_in_config: the sliding window is the config's for every layer, not the layer's own.
    """

    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    norm_offset: float = 0.0
    qk_norm: Literal["head", "all"] | None = None
    soft_cap: bool = False
    fused: bool = False
    window_in_config: bool = False


_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    "gemma2.modeling_gemma2.Gemma2DecoderLayer": Family(norms=_SANDWICH, norm_offset=1.0, soft_cap=True),
    "gemma3.modeling_gemma3.Gemma3DecoderLayer": Family(norms=_SANDWICH, norm_offset=1.0, qk_norm="head"),
    "granite.modeling_granite.GraniteDecoderLayer": Family(),
    "llama.modeling_llama.LlamaDecoderLayer": Family(),
    "mistral.modeling_mistral.MistralDecoderLayer": Family(window_in_config=True),
    "olmo2.modeling_olmo2.Olmo2DecoderLayer": Family(norms=_AFTER, qk_norm="all"),
    "phi3.modeling_phi3.Phi3DecoderLayer": Family(fused=True, window_in_config=True),
    "qwen2.modeling_qwen2.Qwen2DecoderLayer": Family(),
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": Family(qk_norm="head"),
    "smollm3.modeling_smollm3.SmolLM3DecoderLayer": Family(),
}


class UnknownLayerError(Exception):
    """No fast path for this decoder layer; the message says why."""


def read_block(layer: nn.Module) -> Block:
    """Describe a decoder layer without copying a weight.

    Raises:
        UnknownLayerError: the layer must run its own forward, with the reason.
    """
    name = f"{type(layer).__module__}.{type(layer).__qualname__}".removeprefix("transformers.models.")
    family = FAMILIES.get(name)
    if family is None:
        raise UnknownLayerError(f"{type(layer).__qualname__} is not a decoder layer known to cogsym")
    if "forward" in vars(layer):
        raise UnknownLayerError("another library has replaced the layer's forward")
    known: Any = layer
    attention, mlp, config = known.self_attn, known.mlp, known.self_attn.config
    hidden_act = getattr(config, "hidden_activation", None) or config.hidden_act
    activation = _ACTIVATIONS.get(hidden_act)
    if activation is None:
        raise UnknownLayerError(f"the activation {hidden_act!r} has no kernel")
    if not attention.is_causal:
        raise UnknownLayerError("its attention is bidirectional")
    if getattr(config, "resid_pdrop", 0.0):
        raise UnknownLayerError(f"it drops out {config.resid_pdrop:.0%} of what it adds to the stream")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    qkv = tuple(n * attention.head_dim for n in (heads, groups, groups))
    gate_up = (config.intermediate_size,) * 2
    norms = [Norm(layer, norm, family.norm_offset) if norm else None for norm in family.norms]
    q_norm, k_norm = (
        Norm(attention, norm, family.norm_offset) if family.qk_norm else None for norm in ("q_norm", "k_norm")
    )
    window = config.sliding_window if family.window_in_config else getattr(attention, "sliding_window", None)
    return Block(
        attention=attention,
        mlp=mlp,
        qkv=Projections(attention, ("qkv_proj",) if family.fused else ("q_proj", "k_proj", "v_proj"), qkv),
        output=Projections(attention, ("o_proj",), (config.hidden_size,)),
        gate_up=Projections(mlp, ("gate_up_proj",) if family.fused else ("gate_proj", "up_proj"), gate_up),
        down=Projections(mlp, ("down_proj",), (config.hidden_size,)),
        attention_norm=norms[0],
        attention_output_norm=norms[1],
        mlp_norm=norms[2],
        mlp_output_norm=norms[3],
        q_norm=q_norm,
        k_norm=k_norm,
        normed=family.qk_norm or "head",
        activation=activation,
        scale=attention.scaling,
        soft_cap=attention.attn_logit_softcapping if family.soft_cap else None,
        sliding_window=window,
        rotated=bool(getattr(attention, "use_rope", True)),
        residual_scale=getattr(layer, "residual_multiplier", 1.0),
    )
