"""The engine's other way: layers that are not known to cogsym run their own forward, a state at a time.

States are shared between configurations as ever; sequences are rows of a padded batch and share nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cogsym.decoder import decoder_of, layers_of, set_layers
from cogsym.errors import CogsymError
from cogsym.models.calls import layer_calls, without_layers
from cogsym.sweeps.engine.prefixes import Batch, OnEnds
from cogsym.sweeps.engine.requests import Generate, Generated
from cogsym.sweeps.engine.sampling import Sampling, Stops
from cogsym.sweeps.engine.weights import LayerSource
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.schedule import Schedule, needed
from cogsym.sweeps.layers.trie import units


class FallbackRun:
    """One pass on the model's own layers."""

    def __init__(self, layers: LayerSource, schedule: Schedule, batch: Batch, on_ends: OnEnds) -> None:
        """Prepare it; `run` runs it. See `Engine.run`."""
        self._layers, self._schedule, self._on_ends = layers, schedule, on_ends
        ids, mask = padded(batch.sequences)
        self._rows, self._columns = torch.tensor(batch.scored, device=layers.device).unbind(1)
        embedded, self._calls = layer_calls(
            layers.model, input_ids=ids.to(layers.device), attention_mask=mask.to(layers.device)
        )
        self._states = embedded.new_empty(schedule.slots, *embedded.shape)
        self._embedded = embedded
        # What layers write for those behind them, such as shared keys and values: of each state, by the original's id.
        self._written: list[dict[int, Any]] = [{} for _ in range(schedule.slots)]

    def run(self, on_forwards: Callable[[float], None]) -> None:
        """Compute every state, and tell how many layers it took."""
        if self._schedule.start:
            self._end(self._schedule.start, self._embedded)
        if self._schedule.slots:
            self._states[0] = self._embedded
        layers = self._schedule.by_layer()
        for steps, loaded in zip(layers, self._layers.walk(needed(layers)), strict=True):
            for step in steps:
                for to in step.copies:
                    self._states[to.target] = self._states[to.source]
                    self._written[to.target] = {k: copy(v) for k, v in self._written[to.source].items()}
                for slot in range(step.slots.start, step.slots.stop):
                    self._apply(loaded[step.unit.weights].layer, step.unit.layer, slot)
                    on_forwards(step.unit.forwards)
                for end in step.ends:
                    self._end(end.configurations, self._states[end.slot])

    def _apply(self, layer: Any, index: int, slot: int) -> None:
        written = self._written[slot]
        call = {
            name: written.setdefault(id(value), copy(value)) if isinstance(value, MutableMapping) else value
            for name, value in self._calls[index].items()
        }
        with no_missing_keys(bool(written)):
            y = layer(self._states[slot], **call)
        self._states[slot] = y[0] if isinstance(y, tuple) else y

    def _end(self, configurations: tuple[int, ...], state: Tensor) -> None:
        hidden = state[..., self._rows, self._columns, :]  # [P, D], or columns of the stream before them
        self._on_ends([configurations], hidden.movedim(-2, 0).flatten(1)[None])


@contextmanager
def no_missing_keys(shared: bool) -> Iterator[None]:
    """Say in a sentence that a layer reads what a skipped one would have written, where layers share anything."""
    try:
        yield
    except KeyError as error:
        if not shared:
            raise
        raise CogsymError(
            f"A configuration skips the layer whose keys and values ({error.args[0]}) later layers share; skip it only "
            "together with all of those."
        ) from error


def padded(sequences: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 [B, T] each, padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return ids, mask


def generate_fallback(
    layers: LayerSource,
    configurations: Sequence[Configuration],
    requests: Sequence[Generate],
    stops: Stops,
    sampling: Sampling,
) -> list[list[Generated]]:
    """What configurations write where layers run their own forward: one configuration after the other, with only the
    layers it keeps, and transformers' cache where that holds keys and values alone. Otherwise as
    `cogsym.sweeps.engine.generate.generate`."""
    return [_generate_one(layers, configuration, requests, stops, sampling) for configuration in configurations]


@torch.inference_mode()
def _generate_one(
    layers: LayerSource, configuration: Configuration, requests: Sequence[Generate], stops: Stops, sampling: Sampling
) -> list[Generated]:
    chance = [sampling.stream(configuration.code, request) for request in requests]
    written: list[list[int]] = [[] for _ in requests]
    answers: list[Generated | None] = [None] * len(requests)
    with only_layers(layers, configuration) as model:
        next_logits = _next_logits(model)
        while None in answers:
            logits = next_logits([(*r.tokens, *new) for r, new in zip(requests, written, strict=True)])
            if sampling.temperature:
                drawn = torch.tensor([stream.random() for stream in chance], dtype=torch.float64, device=logits.device)
                tokens = sampling.choose(logits.float(), drawn)
            else:
                tokens = logits.argmax(-1)
            for i, token in enumerate(tokens.tolist()):
                written[i].append(token)
                if answers[i] is None:
                    answers[i] = stops.ended(requests[i], written[i])
    return [answer for answer in answers if answer is not None]


def _next_logits(model: Any) -> Callable[[Sequence[tuple[int, ...]]], Tensor]:
    """A function that gives the logits of the token behind each sequence, [B, V], called with one more token of every
    sequence each time: by transformers' cache, or anew where a layer keeps something else than keys and values."""
    parameters = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    cache: Any = DynamicCache(config=decoder_of(model).config)
    kinds = [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers]
    if "past_key_values" not in parameters or kinds != [True] * len(layers_of(model)):
        cache = None

    def next_logits(sequences: Sequence[tuple[int, ...]]) -> Tensor:
        nonlocal cache
        if cache is None:
            return _anew(model, sequences)
        longest, before = max(map(len, sequences)), cache.get_seq_length()
        short = torch.tensor([longest - len(sequence) for sequence in sequences], device=model.device)
        mask = (torch.arange(longest, device=model.device) >= short[:, None]).long()
        ids = torch.tensor([[0] * (longest - len(s)) + list(s) for s in sequences], device=model.device)
        logits: Tensor = model(
            input_ids=ids[:, before:], attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, before:], past_key_values=cache, use_cache=True, **last,
        ).logits  # fmt: skip
        if any(layer.get_seq_length() != longest for layer in cache.layers):
            cache = None  # a layer has a memory of its own
            return _anew(model, sequences)
        return logits[:, -1]

    return next_logits


def _anew(model: Any, sequences: Sequence[tuple[int, ...]]) -> Tensor:
    """By the whole sequences once more, padded behind their ends, where no layer looks."""
    ids, mask = (t.to(model.device) for t in padded(sequences))
    ends, at = (mask.sum(1) - 1).unique(return_inverse=True)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    with no_missing_keys(bool(getattr(decoder_of(model).config, "num_kv_shared_layers", 0))):
        logits: Tensor = model(
            input_ids=ids, attention_mask=mask, use_cache=False, **({"logits_to_keep": ends} if keeps else {})
        ).logits
    return logits[torch.arange(len(ids)), at if keeps else ends[at]]


@contextmanager
def only_layers(layers: LayerSource, configuration: Configuration) -> Iterator[Any]:
    """The model as a configuration has it, as an ordinary model, for as long as it lasts.

    The layers it keeps or reverts are in memory together, streamed or not, and none may keep only a half.
    """
    model = layers.model
    every, units_of = layers_of(model), units(configuration, "whole")
    loaded = layers.walk([(unit.layer, {unit.weights}) for unit in units_of])
    kept = {unit.layer: there[unit.weights].layer for unit, there in zip(units_of, loaded, strict=True)}
    try:
        set_layers(model, nn.ModuleList(kept.get(i, layer) for i, layer in enumerate(every)))
        with without_layers(model, set(range(len(every))) - set(kept)):
            yield model
    finally:
        set_layers(model, every)
