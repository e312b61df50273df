"""Requests of any kind, asked of many configurations together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cogsym.sweeps.engine.fallback import generate_fallback
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.generate import generate
from cogsym.sweeps.engine.requests import Generate, Outcome, Request, Score
from cogsym.sweeps.engine.sampling import Sampling, Stops
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import LayerSource
from cogsym.sweeps.layers.trie import Trie


@dataclass(frozen=True)
class Answers:
    """What a model answers.

    Attributes:
        layers: its layers.
        engine: runs them.
        head: of the model.
        stops: where writing ends.
        sampling: how tokens are drawn.
    """

    layers: LayerSource
    engine: Engine
    head: SweepHead
    stops: Stops
    sampling: Sampling

    def __call__(self, requests: Sequence[Request], trie: Trie) -> list[list[Outcome]]:
        """[configuration][request]."""
        outcomes: list[list[Any]] = [[None] * len(requests) for _ in trie.configurations]
        scores = [(i, request) for i, request in enumerate(requests) if isinstance(request, Score)]
        prompts = [(i, request) for i, request in enumerate(requests) if isinstance(request, Generate)]
        if scores:
            found = score(self.engine, self.head, trie, [request for _, request in scores])
            for row, answers in zip(outcomes, found, strict=True):
                for (i, _), answer in zip(scores, answers, strict=True):
                    row[i] = answer
        if prompts:
            written = self._generate(trie, [request for _, request in prompts])
            for row, texts in zip(outcomes, written, strict=True):
                for (i, _), text in zip(prompts, texts, strict=True):
                    row[i] = text
        return outcomes

    def _generate(self, trie: Trie, requests: list[Generate]) -> Any:
        if trie.topology == "whole":
            return generate_fallback(self.layers, trie.configurations, requests, self.stops, self.sampling)
        return generate(self.engine, self.head, trie, requests, self.stops, self.sampling)
