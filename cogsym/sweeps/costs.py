"""What a pass over documents takes: bytes, and about how many seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from cogsym.models import Block
from cogsym.models.inference import add_attention, add_mlp
from cogsym.sweeps.engine import TOKENS_AT_ONCE
from cogsym.sweeps.heads import SweepHead
from cogsym.sweeps.layers import Layers
from cogsym.sweeps.requests import Document, Generate, Score
from cogsym.sweeps.trie import Trie

# A piece is what is committed together; more tokens make no product faster and a kill lose more.
_TOKENS_A_PIECE = 8192
_ROWS_A_PIECE = 4096


def free_memory(device: torch.device) -> int:
    """Half of the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 2)
    return int(psutil.virtual_memory().available // 2)


@dataclass(frozen=True)
class Sizes:
    """What a model's layers take for each token.

    Attributes:
        state: bytes of a token's state.
        between: bytes of what lies between a block's products, for each token that goes through it.
        cached: bytes of a token's keys and values in one layer.
    """

    state: int
    between: int
    cached: int

    @classmethod
    def of(cls, layers: Layers) -> Sizes:
        """Read off the model's configuration."""
        config: Any = layers.model.config.get_text_config()
        element = layers.model.get_input_embeddings().weight.element_size()
        heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        between = 3 * config.hidden_size + 3 * (heads + 2 * groups) * width + 3 * config.intermediate_size
        return cls(element * config.hidden_size, element * between, element * 2 * groups * width)


@dataclass(frozen=True)
class _Load:
    """What documents ask of a pass together.

    Attributes:
        scored: tokens that go through the layers to be scored.
        scores: tokens of the continuations and of what stands before them.
        prompts: tokens of prompts.
        generated: prompts.
        longest_prompt: tokens of the longest one.
        longest_new: tokens that the longest answer may have.
    """

    scored: int = 0
    scores: int = 0
    prompts: int = 0
    generated: int = 0
    longest_prompt: int = 0
    longest_new: int = 0

    @classmethod
    def of(cls, document: Document) -> _Load:
        scores = [len(r.tokens) for r in document.requests if isinstance(r, Score)]
        generated = [r for r in document.requests if isinstance(r, Generate)]
        prompts = [len(r.tokens) for r in generated]
        return cls(
            sum(scores) - len(scores),
            sum(scores),
            sum(prompts),
            len(prompts),
            max(prompts, default=0),
            max((r.max_new_tokens for r in generated), default=0),
        )

    def __add__(self, other: _Load) -> _Load:
        return _Load(
            self.scored + other.scored,
            self.scores + other.scores,
            self.prompts + other.prompts,
            self.generated + other.generated,
            max(self.longest_prompt, other.longest_prompt),
            max(self.longest_new, other.longest_new),
        )


class Costs:
    """Bytes of passes of one trie."""

    def __init__(self, sizes: Sizes, trie: Trie) -> None:
        """For a trie on a model of these sizes."""
        self._sizes = sizes
        self._slots = trie.schedule(narrow=False).slots + 1  # and the embeddings
        self._configurations = len(trie.configurations)
        self._whole = any(node.unit is not None and node.unit.part == "layer" for node in trie.nodes)
        caches = [node.unit is not None and node.unit.part != "mlp" for node in trie.nodes]
        self._nodes = sum(caches)
        rows = [sum(caches[n] for n in trie.path(c)) for c in range(self._configurations)]
        self._rows, self._deepest = sum(rows), max(rows)

    def of(self, documents: Sequence[Document]) -> int:
        """Bytes that the documents take together."""
        return self._bytes(sum(map(_Load.of, documents), _Load()))

    def piece(self, documents: Sequence[Document], budget: int, large: bool) -> int:
        """How many of the first documents go together: as many as fit, at least one.

        Args:
            documents: in order.
            budget: bytes.
            large: fill the budget, for each piece reads the layers anew; else a piece is no larger than useful.
        """
        load = _Load.of(documents[0])
        for i, document in enumerate(documents[1:], start=1):
            load += _Load.of(document)
            if self._bytes(load) > budget or not (large or self._useful(load)):
                return i
        return len(documents)

    def _bytes(self, load: _Load) -> int:
        if self._whole:  # one configuration after the other
            cached = self._deepest * load.generated * (load.longest_prompt + load.longest_new)
        else:
            cached = self._nodes * load.prompts + self._rows * load.generated * load.longest_new
        tokens = max(load.scored, load.prompts)
        return (
            self._slots * tokens * self._sizes.state
            + max(tokens, TOKENS_AT_ONCE) * self._sizes.between
            + cached * self._sizes.cached
        )

    def _useful(self, load: _Load) -> bool:
        tokens, rows = load.scores + load.prompts, load.generated * self._configurations
        return tokens <= _TOKENS_A_PIECE and rows <= _ROWS_A_PIECE


class Clock:
    """About how long passes take here, from a block and the head run on random states."""

    def __init__(self, block: Block, head: SweepHead, layers: Layers) -> None:
        """Time a block and the head of a model, when it is asked for."""
        self._block, self._head, self._layers = block, head, layers
        self._known: dict[int, float] = {}

    def seconds(self, trie: Trie, documents: Sequence[Document]) -> float:
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
            together = min(len(prompts), max(1, _ROWS_A_PIECE // counts.configurations))
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
            turns = x.new_zeros(1, rounded, self._block.attention.head_dim // 2)
            self._known[rounded] = _fastest(lambda: _run(self._block, x, turns)) / rounded
        return self._known[rounded]

    def _head_seconds(self) -> float:
        """Seconds of the head for each of some positions."""
        if -1 not in self._known:
            x = self._states(256)
            targets = torch.zeros(256, dtype=torch.int64, device=x.device)
            self._known[-1] = _fastest(lambda: self._head.scores(x, targets)) / 256
        return self._known[-1]

    def _states(self, tokens: int) -> torch.Tensor:
        weight = self._layers.model.get_input_embeddings().weight
        return torch.randn(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)


def _run(block: Block, x: torch.Tensor, turns: torch.Tensor) -> None:
    y = x.clone()
    add_attention(block, y, turns, turns, lambda q, k, v: q)
    add_mlp(block, y)


def _fastest(work: Any) -> float:
    with torch.inference_mode():
        times = []
        for _ in range(4):
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times[1:])


def _shared(scores: Sequence[Score]) -> int:
    """Tokens that the options of a question would repeat."""
    return sum(r.first for r in scores[1:] if r.tokens[: r.first] == scores[0].tokens[: r.first])
