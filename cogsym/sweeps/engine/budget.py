"""What a pass over documents takes in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogsym.decoder import layers_of
from cogsym.models.attention import AttentionHalf
from cogsym.models.calls import layer_calls
from cogsym.models.precision import stream_dtype
from cogsym.sweeps.engine.forward import TOKENS_AT_ONCE
from cogsym.sweeps.engine.requests import Generate, Score, TaskDocument
from cogsym.sweeps.engine.weights import LayerSource
from cogsym.sweeps.layers.schedule import schedule
from cogsym.sweeps.layers.trie import Trie

# A piece is what is committed together; more tokens make no product faster and a kill lose more.
_TOKENS_A_PIECE = 8192
ROWS_A_PIECE = 4096
_AT_HEAD = 3  # what configurations end with, gathered, normed and as the head takes it


@dataclass(frozen=True)
class TokenBytes:
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
    def of(cls, layers: LayerSource) -> TokenBytes:
        """Read off the first layer; guessed from the shapes of weights where it is not known."""
        element = stream_dtype(layers.model).itemsize
        block = layers.block
        if block is not None and isinstance(block.attention, AttentionHalf):
            cached = sum(block.attention.qkv.sizes[1:])
            return cls(element * block.attention.width, element * block.working_elements(), element * cached)
        config: Any = layers.model.config.get_text_config()
        embedded, _ = layer_calls(layers.model, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=layers.device))
        made = max(
            sum(max(p.shape[-2:]) for p in layer.parameters() if p.dim() > 1) for layer in layers_of(layers.model)
        )
        heads = getattr(config, "num_attention_heads", 1)
        groups = getattr(config, "num_key_value_heads", heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        state = embedded.numel()
        return cls(element * state, element * (3 * state + made), element * 2 * groups * width)


@dataclass(frozen=True)
class _Workload:
    """What documents ask of a pass together.

    Attributes:
        scored: tokens that go through the layers to be scored.
        sequences: what they are tokens of.
        longest_scored: tokens of the longest one.
        scores: tokens of the continuations and of what stands before them.
        prompts: tokens of prompts.
        generated: prompts.
        longest_prompt: tokens of the longest one.
        longest_new: tokens that the longest answer may have.
    """

    scored: int = 0
    sequences: int = 0
    longest_scored: int = 0
    scores: int = 0
    prompts: int = 0
    generated: int = 0
    longest_prompt: int = 0
    longest_new: int = 0

    @classmethod
    def of(cls, document: TaskDocument) -> _Workload:
        scores = [len(r.tokens) for r in document.requests if isinstance(r, Score)]
        generated = [r for r in document.requests if isinstance(r, Generate)]
        prompts = [len(r.tokens) for r in generated]
        return cls(
            sum(scores) - len(scores),
            len(scores),
            max(scores, default=1) - 1,
            sum(scores),
            sum(prompts),
            len(prompts),
            max(prompts, default=0),
            max((r.max_new_tokens for r in generated), default=0),
        )

    def __add__(self, other: _Workload) -> _Workload:
        return _Workload(
            self.scored + other.scored,
            self.sequences + other.sequences,
            max(self.longest_scored, other.longest_scored),
            self.scores + other.scores,
            self.prompts + other.prompts,
            self.generated + other.generated,
            max(self.longest_prompt, other.longest_prompt),
            max(self.longest_new, other.longest_new),
        )


class PassMemory:
    """Bytes of passes of one trie."""

    def __init__(self, sizes: TokenBytes, trie: Trie) -> None:
        """For a trie on a model of these sizes."""
        self._sizes = sizes
        self._slots = schedule(trie, narrow=False).slots + 1  # and the embeddings
        self._configurations = len(trie.configurations)
        self._whole = trie.topology == "whole"
        caches = [node.unit is not None and node.unit.attends for node in trie.nodes]
        self._nodes = sum(caches)
        rows = [sum(caches[n] for n in trie.path(c)) for c in range(self._configurations)]
        self._rows, self._deepest = sum(rows), max(rows)

    def of(self, documents: Sequence[TaskDocument]) -> int:
        """Bytes that the documents take together."""
        return self._bytes(sum(map(_Workload.of, documents), _Workload()))

    def piece(self, documents: Sequence[TaskDocument], budget: int, large: bool) -> int:
        """How many of the first documents go together: as many as fit, at least one.

        Args:
            documents: in order.
            budget: bytes.
            large: fill the budget, for each piece reads the layers anew; else a piece is no larger than useful.
        """
        load = _Workload.of(documents[0])
        for i, document in enumerate(documents[1:], start=1):
            load += _Workload.of(document)
            if self._bytes(load) > budget or not (large or self._useful(load)):
                return i
        return len(documents)

    def pieces(self, documents: Sequence[TaskDocument], budget: int, large: bool) -> Iterator[Sequence[TaskDocument]]:
        """All documents, as many together as `piece` says."""
        while documents:
            number = self.piece(documents, budget, large)
            yield documents[:number]
            documents = documents[number:]

    def _bytes(self, load: _Workload) -> int:
        if self._whole:  # rows of a padded batch, one state or configuration after the other
            tokens = max(load.sequences * load.longest_scored, load.generated * load.longest_prompt)
            together = tokens
            cached = self._deepest * load.generated * (load.longest_prompt + load.longest_new)
        else:
            tokens = max(load.scored, load.prompts)
            together = max(tokens, min(TOKENS_AT_ONCE, self._slots * tokens))
            cached = self._nodes * load.prompts + self._rows * load.generated * load.longest_new
        return (
            (self._slots * tokens + _AT_HEAD * together) * self._sizes.state
            + together * self._sizes.between
            + cached * self._sizes.cached
        )

    def _useful(self, load: _Workload) -> bool:
        tokens, rows = load.scores + load.prompts, load.generated * self._configurations
        return tokens <= _TOKENS_A_PIECE and rows <= ROWS_A_PIECE


def largest(documents: Mapping[str, Sequence[TaskDocument]], memories: Sequence[PassMemory]) -> tuple[int, str]:
    """(the most bytes that a document takes by itself in one of the passes, which document of which task it is).

    Args:
        documents: of each task by its name.
        memories: of the passes.
    """
    every = [(task, document) for task, of in documents.items() for document in of]
    task, most = max(every, key=lambda pair: memories[0].of([pair[1]]))
    return max(memory.of([most]) for memory in memories), f"the document {most.key} of the task {task}"
