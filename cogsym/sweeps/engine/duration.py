"""About how many seconds a pass over documents takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from cogsym.models import Block
from cogsym.models.attention import AttentionHalf
from cogsym.models.precision import stream_dtype
from cogsym.sweeps.engine.budget import ROWS_A_PIECE
from cogsym.sweeps.engine.forward import TOKENS_AT_ONCE
from cogsym.sweeps.engine.requests import Generate, Score, TaskDocument
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import LayerSource
from cogsym.sweeps.layers.trie import Trie

_LEAST_CALLS, _WHILE = 3, 0.3  # so many calls, and seconds, are timed


class DurationEstimate:
    """About how long passes take here, from a block and the head run on random states."""

    def __init__(self, block: Block, head: SweepHead, layers: LayerSource) -> None:
        """Time a block and the head of a model, when it is asked for."""
        self._block, self._head, self._layers = block, head, layers
        self._known: dict[int, float] = {}

    def seconds(self, trie: Trie, documents: Sequence[TaskDocument]) -> float:
        """About how long the documents take."""
        counts, total = trie.counts(), 0.0
        for document in documents:
            scores = [r for r in document.requests if isinstance(r, Score)]
            tokens = sum(len(r.tokens) - 1 for r in scores) - _shared(scores)
            total += tokens * counts.layer_forwards * self._layer(TOKENS_AT_ONCE // 4)
            total += sum(len(r.tokens) - r.first for r in scores) * counts.head_forwards * self._head_seconds()
        prompts = [r for document in documents for r in document.requests if isinstance(r, Generate)]
        if prompts:
            total += sum(len(r.tokens) for r in prompts) * counts.layer_forwards * self._layer(TOKENS_AT_ONCE // 4)
            together = min(len(prompts), max(1, ROWS_A_PIECE // counts.configurations))
            rows = max(1, int(together * counts.kept_layers / max(1, len(trie.configurations[0].actions))))
            new = max(r.max_new_tokens for r in prompts)
            passes = len(prompts) / together * new
            total += passes * len(trie.configurations[0].actions) * rows * self._layer(rows)
            total += passes * counts.configurations * together * self._head_seconds()
        return total

    def _layer(self, tokens: int) -> float:
        """Seconds of a block for each of so many tokens."""
        rounded = 1 << max(0, tokens - 1).bit_length()
        if rounded not in self._known:
            x = self._states(rounded)
            angles = x.new_zeros(1, rounded, _head_dim(self._block) // 2)
            self._known[rounded] = _mean_seconds(lambda: _run(self._block, x, angles)) / rounded
        return self._known[rounded]

    def _head_seconds(self) -> float:
        """Seconds of the head for each of some positions."""
        if -1 not in self._known:
            x = self._states(256)
            targets = torch.zeros(256, dtype=torch.int64, device=x.device)
            self._known[-1] = _mean_seconds(lambda: self._head.scores(x, targets)) / 256
        return self._known[-1]

    def _states(self, tokens: int) -> torch.Tensor:
        weight = self._layers.model.get_input_embeddings().weight
        return torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=stream_dtype(self._layers.model))


def _run(block: Block, x: torch.Tensor, angles: torch.Tensor) -> None:
    y = x.clone()
    block.add_attention(y, angles, angles, lambda q, k, v: q, both=block.parallel)
    if not block.parallel:
        block.add_mlp(y)


def _head_dim(block: Block) -> int:
    assert isinstance(block.attention, AttentionHalf)
    return block.attention.head_dim


def _mean_seconds(work: Callable[[], object]) -> float:
    """Of a call, after a first. The mean of a while, not the fastest: what else the machine does takes its time too."""
    with torch.inference_mode():
        work()
        began, calls = time.perf_counter(), 0
        while calls < _LEAST_CALLS or time.perf_counter() - began < _WHILE:
            work()
            calls += 1
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls


def _shared(scores: Sequence[Score]) -> int:
    """Tokens that the options of a question would repeat."""
    return sum(r.first for r in scores[1:] if r.tokens[: r.first] == scores[0].tokens[: r.first])
