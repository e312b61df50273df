"""What a model does around its decoder layers: what it calls them with, and what it makes of their outcome."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from cogsym.decoder import decoder_of, layers_of
from cogsym.errors import CogsymError

_BESIDE = object()  # what a layer hands on beside the residual stream, where it is not computed


def layer_calls(model: Any, **inputs: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run everything of a decoder model but its layers.

    The model's own forward makes embeddings, position embeddings and masks, whatever its family does to them; the
    layers are never computed, so that their weights need not be there.

    Args:
        model: a decoder model of transformers.
        inputs: for its decoder, such as input_ids and position_ids, [B, T] each.

    Returns:
        The first layer's input, [..., B, T, D], where Gemma 3n has several columns of the stream before the batch; and
        for each layer the keywords it was called with.

    Raises:
        CogsymError: a layer reads what one before it made beside the stream.
    """
    decoder, layers = decoder_of(model), layers_of(model)
    embedded: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    with _forwards({layer: _recorder(layer, embedded, calls) for layer in layers}):
        decoder(**inputs, use_cache=False)
    for name, value in (item for call in calls for item in call.items()):
        if value is _BESIDE:
            raise CogsymError(
                f"The layers of {type(model).__name__} hand on {name} beside the residual stream, which a sweep does "
                "not carry; sweep a model whose layers hand on the stream alone."
            )
    return embedded[0], calls


def token_inputs(model: Any, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[Any]]:
    """What single tokens come to the layers with: no mask is needed where no layer looks at another token.

    Args:
        model: a decoder model of transformers.
        tokens: ids, int64 [N].
        positions: of each, int64 [N].

    Returns:
        The first layer's input, [N, D], and for each layer its position embeddings, [N, 1, R] each, or None.
    """
    embedded, calls = layer_calls(model, input_ids=tokens[:, None], position_ids=positions[:, None])
    return embedded[:, 0], [call.get("position_embeddings") for call in calls]


class TokenInputs:
    """`token_inputs` of a model without entering its decoder for each call.

    The decoder tells once what it makes of every position, and by how much it scales an embedding. Where position
    embeddings depend on the tokens beside (dynamic and long rotary embeddings look at the last position of a batch), or
    a token is more than its embedding, it is entered for each call as ever.
    """

    def __init__(self, model: Any, tokens: Tensor, positions: int) -> None:
        """Ask the decoder.

        Args:
            model: a decoder model of transformers.
            tokens: some ids, int64 [N], to hold the embeddings against.
            positions: how many there are, from 0; two or more.
        """
        self._model, self._embed, self._scale = model, model.get_input_embeddings(), 1.0
        self._tables: list[Any] | None = None  # for each layer (cos, sin), [positions, 1, R] each, or None
        if _depends_on_neighbours(decoder_of(model)):
            return
        where = torch.arange(positions, device=tokens.device)
        ids = tokens[where % len(tokens)]
        _, alone = token_inputs(model, ids[1:2], where[1:2])
        x, tables = token_inputs(model, ids, where)
        pairs = {id(table): (table, row) for table, row in zip(tables, alone, strict=True)}
        if self._scales(ids, x) and all(_are_rows(*pair, positions) for pair in pairs.values()):
            self._tables = tables

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[Any]]:
        """As `token_inputs` of these tokens."""
        if self._tables is None:
            return token_inputs(self._model, tokens, positions)
        chosen = {id(t): t and tuple(part[positions] for part in t) for t in self._tables}  # layers share them
        x = self._embed(tokens[:, None])[:, 0]
        return x if self._scale == 1 else x * self._scale, [chosen[id(t)] for t in self._tables]

    def _scales(self, ids: Tensor, x: Tensor) -> bool:
        """Whether what comes to the layers, [N, D], is the embeddings times a number, bit for bit."""
        embedded = self._embed(ids[:, None])[:, 0]
        if torch.equal(embedded, x):
            return True
        ones = torch.ones_like(embedded[:1, None], dtype=torch.float64)
        scales, _ = layer_calls(self._model, inputs_embeds=ones)
        self._scale = float(scales.flatten()[0])
        return torch.equal(embedded * self._scale, x)


def _depends_on_neighbours(decoder: Any) -> bool:
    """Whether position embeddings are those of a kind that `transformers.modeling_rope_utils` updates by the batch."""
    kinds = (getattr(module, "rope_type", None) for module in decoder.modules())
    named = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(name is not None and ("dynamic" in name or name == "longrope") for name in named)


def _are_rows(table: Any, row: Any, number: int) -> bool:
    """Whether position embeddings have a row for each of so many positions, that of position 1 as it is alone."""
    if table is None or row is None:
        return table is row
    return all(len(part) == number and torch.equal(part[1:2], one) for part, one in zip(table, row, strict=True))


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """What a causal language model makes of states behind its last layer, whatever its family does to them.

    Args:
        model: the model.
        hidden: [..., D], all columns of the stream beside each other.

    Returns:
        Its logits, [..., V].
    """
    rows = hidden.reshape(-1, hidden.shape[-1])

    def behind(embedded: Tensor, *_: Any, **__: Any) -> Tensor:
        columns, width = embedded.shape[:-3], embedded.shape[-1]
        return _Outcome.of(rows.view(-1, *columns, 1, width).movedim(0, -3))

    ids = torch.zeros(len(rows), 1, dtype=torch.int64, device=hidden.device)
    with _forwards(dict.fromkeys(layers_of(model), behind)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1)


@contextmanager
def without_layers(model: Any, skipped: Collection[int]) -> Iterator[None]:
    """Let some layers hand on the residual stream as it is, for as long as it lasts.

    All others keep their places, and with them what the model gives each: masks, positions, inputs of its own. In a
    cache of keys and values, whose length is read off one of the layers, a skipped one has as many as they have.
    """
    layers = layers_of(model)
    with _forwards({layers[i]: functools.partial(_hand_on, i) for i in skipped}):
        yield


def _hand_on(index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, Cache)):
        nothing = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        cache.update(nothing, nothing, index)
    return _Outcome.of(x)


class _Outcome(Tensor):
    """A layer's outcome for decoders that take it as it is, the first entry of a tuple, or both of a pair."""

    # What is computed from it is an ordinary tensor, of which an index takes a row.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(x: Tensor) -> Tensor:
        return x.as_subclass(_Outcome) if x.dim() == 3 else x  # several columns of the stream are never in a tuple

    def __getitem__(self, index: Any) -> Any:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.as_subclass(Tensor), _BESIDE))


@contextmanager
def _forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Layers with other forwards in the place of their own."""
    before = {layer: vars(layer).get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


def _recorder(layer: Any, embedded: list[Tensor], calls: list[dict[str, Any]]) -> Any:
    signature = _signature(type(layer).forward)

    def record(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(layer, x, *args, **kwargs).arguments
        named = dict(list(bound.items())[2:])  # without the layer and the stream
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        embedded.append(x)
        calls.append(named)
        return _Outcome.of(x)

    return record


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
