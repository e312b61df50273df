"""Where models of transformers keep what is around and in their decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from cogsym.errors import CogsymError

# What decoders call their layers, and the norm behind them.
LAYER_NAMES = ("layers", "h", "blocks")
_NORMS = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "final_norm", "norm_f", "embedding_norm",
)  # fmt: skip


def decoder_of(model: Any) -> Any:
    """The decoder of a language model: embeddings, layers, final norm.

    Raises:
        CogsymError: it has no decoder layers where transformers keeps them.
    """
    decoder = getattr(model, "get_decoder", lambda: None)()
    if not any(isinstance(getattr(decoder, name, None), nn.ModuleList) for name in LAYER_NAMES):
        raise CogsymError(
            f"{type(model).__name__} has no decoder layers at get_decoder().layers (or "
            f".{', .'.join(LAYER_NAMES[1:])}), expected a decoder language model such as AutoModelForCausalLM gives."
        )
    return decoder


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers, wherever the model's decoder keeps them.

    Raises:
        CogsymError: as `decoder_of`.
    """
    layers: nn.ModuleList = getattr(decoder_of(model), layers_name_of(model))
    return layers


def set_layers(model: Any, layers: nn.ModuleList) -> None:
    """Put other layers in the place of the decoder's.

    Raises:
        CogsymError: as `decoder_of`.
    """
    setattr(decoder_of(model), layers_name_of(model), layers)


def final_norm_of(model: Any) -> tuple[str, nn.Module] | None:
    """The norm behind the last layer and its name in the decoder, or None."""
    decoder = decoder_of(model)
    found = ((name, getattr(decoder, name, None)) for name in _NORMS)
    return next(((name, norm) for name, norm in found if isinstance(norm, nn.Module)), None)


def before_layers_of(model: Any) -> list[nn.Module]:
    """What of the decoder is neither layers nor final norm: embeddings of tokens and positions, their norm, what each
    layer is given of its own."""
    norm = final_norm_of(model)
    others = {layers_name_of(model), norm[0] if norm else None}
    return [module for name, module in decoder_of(model).named_children() if name not in others]


def layers_name_of(model: Any) -> str:
    """What the decoder calls its layers."""
    decoder = decoder_of(model)
    return next(name for name in LAYER_NAMES if isinstance(getattr(decoder, name, None), nn.ModuleList))
