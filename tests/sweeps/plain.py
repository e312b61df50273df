"""The plain way: for each configuration a model of its own, by transformers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from own_models import Passing
from torch import Tensor, nn

from cogsym.decoder import layers_of, set_layers
from cogsym.sweeps.layers.configurations import Configuration


class _Nothing(nn.Module):
    """A half of a layer whose contribution is gone. A norm behind it makes zeros of zeros."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor | None = None, *, hidden_states: Tensor | None = None, **_: Any) -> Any:
        zero = torch.zeros_like(hidden_states if x is None else x)
        return (zero, None) if self.pair else zero


def plain_model(model: Any, configuration: Configuration, base: Any | None = None) -> Any:
    """A fresh copy of `model` with layers removed, reverted, or without a half."""
    fresh = copy.deepcopy(model, {id(model.get_decoder().layers): nn.ModuleList()})  # the layers one by one, below
    if getattr(fresh.config, "attn_logit_softcapping", None):  # which transformers 5.17 forgets with its default
        fresh.set_attn_implementation("eager")
    decoder, config, layers = fresh.get_decoder(), fresh.get_decoder().config, []
    types = getattr(config, "layer_types", None)
    kept = [i for i, action in enumerate(configuration.actions) if action != "skip"]
    for place, i in enumerate(kept):
        action = configuration.actions[i]
        source = (base if action == "revert" else model).get_decoder()
        layer = copy.deepcopy(source.layers[i], {id(source.config): config})
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
        if action == "skip_attention":
            layer.self_attn = _Nothing(pair=True)
        if action == "skip_mlp":
            layer.mlp = _Nothing(pair=type(layer).__name__ == "GptOssDecoderLayer")
        layers.append(layer)
    decoder.layers = nn.ModuleList(layers)
    config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = [types[i] for i in kept]
    return fresh


def plain_in_place(model: Any, configuration: Configuration, base: Any | None = None) -> Callable[..., Any]:
    """`model` with other layers in the places of those that are skipped or reverted, called as it is."""
    layers = [
        Passing(layer) if action == "skip" else layers_of(base)[i] if action == "revert" else layer
        for i, (layer, action) in enumerate(zip(layers_of(model), configuration.actions, strict=True))
    ]

    def run(*args: Any, **kwargs: Any) -> Any:
        own = layers_of(model)
        set_layers(model, nn.ModuleList(layers))
        try:
            return model(*args, **kwargs)
        finally:
            set_layers(model, own)

    return run


@torch.no_grad()
def all_log_probabilities(model: Any, tokens: tuple[int, ...]) -> Tensor:
    """log p of every token of the vocabulary after each token but the last, float64 [T - 1, V]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double().log_softmax(-1)


def log_probabilities(model: Any, tokens: tuple[int, ...]) -> Tensor:
    """log p of each token but the first, float64 [T - 1]."""
    return all_log_probabilities(model, tokens).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


@torch.no_grad()
def greedy_tokens(model: Any, prompt: tuple[int, ...], number: int, end: int) -> list[int]:
    """The most likely tokens one after the other, each from the whole sequence anew, up to `end`."""
    written: list[int] = []
    while len(written) < number and end not in written:
        logits = model(torch.tensor([[*prompt, *written]]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written
