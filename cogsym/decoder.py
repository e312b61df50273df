"""Where models of transformers keep what is around and in their decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from cogsym.errors import CogsymError

_LAYERS = ("layers", "h")  # what decoders call their layers
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm")  # and the norm behind them


def decoder_of(model: Any) -> Any:
    """The decoder of a language model: embeddings, layers, final norm.

    Raises:
        CogsymError: it has no decoder layers where transformers keeps them.
    """
    decoder = getattr(model, "get_decoder", lambda: None)()
    if not any(isinstance(getattr(decoder, name, None), nn.ModuleList) for name in _LAYERS):
        raise CogsymError(
            f"{type(model).__name__} has no decoder layers at get_decoder().layers, expected a decoder language model "
            "such as AutoModelForCausalLM gives."
        )
    return decoder


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers, wherever the model's decoder keeps them.

    Raises:
        CogsymError: as `decoder_of`.
    """
    decoder = decoder_of(model)
    layers: nn.ModuleList = getattr(decoder, _layers_name(decoder))
    return layers


def set_layers(model: Any, layers: nn.ModuleList) -> None:
    """Put other layers in the place of the decoder's.

    Raises:
        CogsymError: as `decoder_of`.
    """
    decoder = decoder_of(model)
    setattr(decoder, _layers_name(decoder), layers)


def final_norm_of(model: Any) -> tuple[str, nn.Module] | None:
    """The norm behind the last layer and its name in the decoder, or None."""
    decoder = decoder_of(model)
    found = ((name, getattr(decoder, name, None)) for name in _NORMS)
    return next(((name, norm) for name, norm in found if isinstance(norm, nn.Module)), None)


def _layers_name(decoder: Any) -> str:
    return next(name for name in _LAYERS if isinstance(getattr(decoder, name, None), nn.ModuleList))
