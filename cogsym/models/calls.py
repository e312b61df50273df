"""What a model calls its decoder layers with: the embeddings as they enter, positions and masks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def layer_calls(model: Any, **inputs: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run everything of a decoder model but its layers.

    The model's own forward makes embeddings, position embeddings and masks, whatever its family does to them; the
    layers are never computed, so that their weights need not be there.

    Args:
        model: a decoder model of transformers.
        inputs: for its decoder, such as input_ids and position_ids, [B, T] each.

    Returns:
        The first layer's input, [B, T, D], and for each layer the keywords it was called with.
    """
    decoder = model.get_decoder()
    embedded: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    forwards = [vars(layer).get("forward") for layer in decoder.layers]
    try:
        for layer in decoder.layers:
            layer.__dict__["forward"] = _recorder(layer, embedded, calls)
        decoder(**inputs, use_cache=False)
    finally:
        for layer, forward in zip(decoder.layers, forwards, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward
    return embedded[0], calls


def _recorder(layer: Any, embedded: list[Tensor], calls: list[dict[str, Any]]) -> Any:
    signature = inspect.signature(type(layer).forward)

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(layer, hidden_states, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if name not in ("self", "hidden_states")}
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        embedded.append(hidden_states)
        calls.append(named)
        return hidden_states

    return record
