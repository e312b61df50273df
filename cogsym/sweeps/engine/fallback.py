"""The engine's other way: layers that are not known to cogsym run their own forward, a state at a time.

States are shared between configurations as ever; sequences are rows of a padded batch and share nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cogsym.decoder import decoder_of, layers_of, set_layers
from cogsym.models.calls import layer_calls
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

    def run(self, on_forwards: Callable[[float], None]) -> None:
        """Compute every state, and tell how many layers it took."""
        if self._schedule.start:
            self._end(self._schedule.start, self._embedded)
        if self._schedule.slots:
            self._states[0] = self._embedded
        layers = self._schedule.by_layer()
        for steps, loaded in zip(layers, self._layers.walk(needed(layers)), strict=True):
            for step in steps:
                for copy in step.copies:
                    self._states[copy.target] = self._states[copy.source]
                layer = loaded[step.unit.weights].layer
                for slot in range(step.slots.start, step.slots.stop):
                    y = layer(self._states[slot], **self._calls[step.unit.layer])
                    self._states[slot] = y[0] if isinstance(y, tuple) else y
                    on_forwards(step.unit.forwards)
                for end in step.ends:
                    self._end(end.configurations, self._states[end.slot])

    def _end(self, configurations: tuple[int, ...], state: Tensor) -> None:
        self._on_ends([configurations], state[self._rows, self._columns][None])


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
    layers it keeps and transformers' cache. Otherwise as `cogsym.sweeps.engine.generate.generate`."""
    return [_generate_one(layers, configuration, requests, stops, sampling) for configuration in configurations]


@torch.inference_mode()
def _generate_one(
    layers: LayerSource, configuration: Configuration, requests: Sequence[Generate], stops: Stops, sampling: Sampling
) -> list[Generated]:
    longest = max(len(request.tokens) for request in requests)
    short = [longest - len(request.tokens) for request in requests]
    ids = torch.tensor([[0] * s + list(r.tokens) for s, r in zip(short, requests, strict=True)], device=layers.device)
    mask = (torch.arange(longest) >= torch.tensor(short)[:, None]).long().to(layers.device)
    chance = [sampling.stream(configuration.code, request) for request in requests]
    written: list[list[int]] = [[] for _ in requests]
    answers: list[Generated | None] = [None] * len(requests)
    with only_layers(layers, configuration) as model:
        cache = DynamicCache() if len(layers_of(model)) else None
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        inputs = ids
        while None in answers:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            logits = model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=cache is not None, **last,
            ).logits[:, -1]  # fmt: skip
            if sampling.temperature:
                drawn = torch.tensor([stream.random() for stream in chance], dtype=torch.float64, device=logits.device)
                tokens = sampling.choose(logits.float(), drawn)
            else:
                tokens = logits.argmax(-1)
            for i, token in enumerate(tokens.tolist()):
                if answers[i] is None:
                    written[i].append(token)
                    answers[i] = stops.ended(requests[i], written[i])
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            inputs = ids if cache is None else tokens[:, None]
    return [answer for answer in answers if answer is not None]


@contextmanager
def only_layers(layers: LayerSource, configuration: Configuration) -> Iterator[Any]:
    """The model with the layers that a configuration keeps or reverts, as an ordinary model, for as long as it lasts.

    They are in memory together, streamed or not, and none may keep only a half.
    """
    model = layers.model
    config, every = decoder_of(model).config, layers_of(model)
    number, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    units_of = units(configuration, "whole")
    loaded = layers.walk([(unit.layer, {unit.weights}) for unit in units_of])
    kept = [there[unit.weights].layer for unit, there in zip(units_of, loaded, strict=True)]
    indexed = [
        (module, module.layer_idx) for layer in kept for module in layer.modules() if hasattr(module, "layer_idx")
    ]
    try:
        for place, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place
        set_layers(model, nn.ModuleList(kept))
        config.num_hidden_layers = len(kept)
        if types is not None:
            config.layer_types = [types[unit.layer] for unit in units_of]
        yield model
    finally:
        set_layers(model, every)
        config.num_hidden_layers = number
        if types is not None:
            config.layer_types = types
        for module, index in indexed:
            module.layer_idx = index
