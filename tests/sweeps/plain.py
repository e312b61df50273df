"""The plain way: for each configuration a model of its own, by transformers alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cogsym.sweeps.configs import Configuration


class _Nothing(nn.Module):
    """A half of a layer whose contribution is gone."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor | None = None, *, hidden_states: Tensor | None = None, **_: Any) -> Any:
        zero = torch.zeros_like(hidden_states if x is None else x)
        return (zero, None) if self.attention else zero


def plain_model(model: Any, configuration: Configuration, base: Any | None = None) -> Any:
    """A fresh copy of `model` with layers removed, reverted, or without a half."""
    fresh = copy.deepcopy(model)
    decoder, layers = fresh.get_decoder(), []
    types, config = getattr(model.config, "layer_types", None), fresh.config
    kept = [i for i, action in enumerate(configuration.actions) if action != "skip"]
    for place, i in enumerate(kept):
        action = configuration.actions[i]
        layer = copy.deepcopy((base if action == "revert" else model).get_decoder().layers[i])
        layer.self_attn.layer_idx = place
        if action == "skip_attention":
            layer.self_attn = _Nothing(attention=True)
            _silence(layer, "post_attention_layernorm")
        if action == "skip_mlp":
            layer.mlp = _Nothing(attention=False)
        layers.append(layer)
    decoder.layers = nn.ModuleList(layers)
    config.num_hidden_layers = decoder.config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = decoder.config.layer_types = [types[i] for i in kept]
    return fresh


def _silence(layer: Any, name: str) -> None:
    """A norm of zeros is zeros; nothing to do, and no test would notice: the name documents it."""


def log_probabilities(model: Any, tokens: tuple[int, ...]) -> Tensor:
    """log p of each token but the first, float64 [T - 1]."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
