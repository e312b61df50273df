"""What a model does around its decoder layers: what it calls them with, and what it makes of their outcome."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cogsym.decoder import decoder_of, layers_of


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
    decoder = decoder_of(model)
    embedded: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    with _forwards(layers_of(model), lambda layer: _recorder(layer, embedded, calls)):
        decoder(**inputs, use_cache=False)
    return embedded[0], calls


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """What a causal language model makes of states behind its last layer, whatever its family does to them.

    Args:
        model: the model.
        hidden: [..., D].

    Returns:
        Its logits, [..., V].
    """
    rows = hidden.reshape(-1, 1, hidden.shape[-1])
    ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=hidden.device)
    with _forwards(layers_of(model), lambda _: lambda *_, **__: _Outcome.of(rows)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.as_subclass(Tensor).reshape(*hidden.shape[:-1], -1)


class _Outcome(Tensor):
    """A layer's outcome for decoders that take it as it is, and for those that take the first entry of a tuple."""

    @staticmethod
    def of(x: Tensor) -> _Outcome:
        return x.as_subclass(_Outcome)

    def __getitem__(self, index: Any) -> Any:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]


@contextmanager
def _forwards(layers: Any, forward: Callable[[Any], Any]) -> Iterator[None]:
    """Layers with `forward(layer)` in the place of their own."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = forward(layer)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


def _recorder(layer: Any, embedded: list[Tensor], calls: list[dict[str, Any]]) -> Any:
    signature = _signature(type(layer).forward)

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(layer, hidden_states, *args, **kwargs).arguments
        named = {name: value for name, value in bound.items() if name not in ("self", "hidden_states")}
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        embedded.append(hidden_states)
        calls.append(named)
        return _Outcome.of(hidden_states)

    return record


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
