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


class TokenCalls:
    """What single tokens come to the layers with, without entering the decoder for each of them.

    The decoder tells once what it makes of every position, and by how much it scales an embedding. Where position
    embeddings depend on the tokens beside (dynamic and long rotary embeddings look at the last position of a batch), or
    a token is more than its embedding, it is entered for each call as ever.
    """

    def __init__(self, model: Any, tokens: Tensor, positions: range) -> None:
        """Ask the decoder.

        Args:
            model: a decoder model of transformers.
            tokens: some ids, int64 [N], to hold the embeddings against.
            positions: all that will be asked for.
        """
        self._model, self._first = model, positions.start
        self._embed, self._scale = model.get_input_embeddings(), 1.0
        self._tables: list[Any] | None = None  # for each layer (cos, sin), [positions, 1, R] each, or None
        if _depends_on_neighbours(decoder_of(model)):
            return
        where = torch.arange(positions.start, positions.stop, device=tokens.device)
        ids = tokens[torch.arange(len(where), device=tokens.device) % len(tokens)]
        _, alone = layer_calls(model, input_ids=ids[:1, None], position_ids=where[:1, None])
        x, together = layer_calls(model, input_ids=ids[:, None], position_ids=where[:, None])
        tables = [call.get("position_embeddings") for call in together]
        own = [call.get("position_embeddings") for call in alone]
        if self._scales(ids, x) and all(_are_rows(t, first, len(where)) for t, first in zip(tables, own, strict=True)):
            self._tables = tables

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[Any]]:
        """The first layer's input of some tokens, [B, D], and for each layer its position embeddings, if it has any.

        Args:
            tokens: ids, int64 [B].
            positions: of each, int64 [B].
        """
        if self._tables is None:
            x, calls = layer_calls(self._model, input_ids=tokens[:, None], position_ids=positions[:, None])
            return x[:, 0], [call.get("position_embeddings") for call in calls]
        rows = positions - self._first
        chosen = {id(t): t and tuple(part[rows] for part in t) for t in self._tables}  # layers share them
        x = self._embed(tokens[:, None])[:, 0]
        return x if self._scale == 1 else x * self._scale, [chosen[id(t)] for t in self._tables]

    def _scales(self, ids: Tensor, x: Tensor) -> bool:
        """Whether what comes to the layers, [N, 1, D], is the embeddings times a number, bit for bit."""
        embedded = self._embed(ids[:, None])
        if not torch.equal(embedded, x):
            ones = torch.ones_like(embedded[:1], dtype=torch.float64)
            scales, _ = layer_calls(self._model, inputs_embeds=ones)
            self._scale = float(scales.flatten()[0])
        return torch.equal(embedded * self._scale, x)


def _depends_on_neighbours(decoder: Any) -> bool:
    """Whether position embeddings are those of a kind that `transformers.modeling_rope_utils` updates by the batch."""
    kinds = (getattr(module, "rope_type", None) for module in decoder.modules())
    named = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(name is not None and ("dynamic" in name or name == "longrope") for name in named)


def _are_rows(table: Any, first: Any, number: int) -> bool:
    """Whether position embeddings have a row for each of so many positions, the first of them as it is alone."""
    if table is None or first is None:
        return table is first
    return all(len(part) == number and torch.equal(part[:1], one) for part, one in zip(table, first, strict=True))


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
