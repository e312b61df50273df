"""Which Hugging Face decoder layers are read into a `Block`, and how.

A family is known by its layer's class, never by a model's name: a subclass, a layer from remote code or one whose
forward another library has replaced may compute something else, and runs its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from cogsym.models.block import Block
from cogsym.ops.gated_activation import Activation

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What distinguishes one family's decoder layer from Llama's.

    Attributes:
        qk_norm: queries and keys are normalised a head at a time.
        window_in_config: the sliding window is the config's for every layer, not the layer's own.
    """

    qk_norm: bool = False
    window_in_config: bool = False


FAMILIES: dict[str, Family] = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": Family(),
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": Family(window_in_config=True),
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": Family(),
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": Family(qk_norm=True),
}


class UnknownLayerError(Exception):
    """No fast path for this decoder layer; the message says why."""


def read_block(layer: nn.Module) -> Block:
    """Describe a decoder layer without copying a weight.

    Raises:
        UnknownLayerError: the layer must run its own forward, with the reason.
    """
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    family = FAMILIES.get(name)
    if family is None:
        raise UnknownLayerError(f"{type(layer).__qualname__} is not a decoder layer known to cogsym")
    if "forward" in vars(layer):
        raise UnknownLayerError("another library has replaced the layer's forward")
    known: Any = layer
    attention, config = known.self_attn, known.self_attn.config
    activation = _ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        raise UnknownLayerError(f"the activation {config.hidden_act!r} has no kernel")
    window = config.sliding_window if family.window_in_config else getattr(attention, "sliding_window", None)
    return Block(
        attention=attention,
        mlp=known.mlp,
        input_norm=known.input_layernorm,
        mlp_norm=known.post_attention_layernorm,
        activation=activation,
        qk_norm=family.qk_norm,
        sliding_window=window,
    )
