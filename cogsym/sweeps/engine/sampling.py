"""The next token of each row, and whether the row is at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogsym.errors import SettingError
from cogsym.sweeps.engine.requests import Generate, Generated


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: of the softmax; 0 takes the most likely token.
        top_p: only the most likely tokens that together reach this probability; 1 is all.
        seed: of the chance.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SettingError("temperature", f"is {self.temperature}, expected 0 (the most likely token) or more.")
        if not 0 < self.top_p <= 1:
            raise SettingError("top_p", f"is {self.top_p}, expected more than 0 and at most 1.")
        if not 0 <= self.seed < 2**32:
            raise SettingError("seed", f"is {self.seed}, expected a whole number from 0 to {2**32 - 1}.")

    def stream(self, configuration: str, request: Generate) -> np.random.Generator:
        """The chance of one configuration and one request, whoever its neighbours are."""
        key = f"{self.seed} {configuration} {request.tokens}"
        return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16])))

    def choose(self, logits: Tensor, chance: Tensor) -> Tensor:
        """A token of each row, int64 [rows], by the inverse of the distribution function.

        Args:
            logits: float32 [rows, V].
            chance: uniform in [0, 1), float64 [rows].
        """
        p, order = (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True)
        below = p.cumsum(-1) - p
        p = p.masked_fill(below >= self.top_p, 0)
        reached = p.cumsum(-1)
        place = torch.searchsorted(reached, chance[:, None] * reached[:, -1:], right=True)
        return order.gather(-1, place.clamp(max=p.shape[-1] - 1))[:, 0]


class Stops:
    """Where texts end: at a token that ends every text, or before one of the request's strings."""

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        """Watch for ends.

        Args:
            tokenizer: turns ids into text.
            ends: ids after which nothing comes.
        """
        self._tokenizer, self._ends = tokenizer, set(ends)
        self._letters: dict[int, set[str]] = {}

    def ended(self, request: Generate, tokens: Sequence[int]) -> Generated | None:
        """What was written, if the last of `tokens` ends it."""
        if tokens[-1] in self._ends:
            return Generated(self._text(tokens[:-1]), len(tokens), "stop")
        if any(stop[-1] in self._read(tokens[-1]) for stop in request.stops):
            text = self._text(tokens)
            found = [at for stop in request.stops if (at := text.find(stop)) >= 0]
            if found:
                return Generated(text[: min(found)], len(tokens), "stop")
        if len(tokens) >= request.max_new_tokens:
            return Generated(self._text(tokens), len(tokens), "length")
        return None

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _read(self, token: int) -> set[str]:
        """The characters of a token, by which most are known not to end a stop."""
        if token not in self._letters:
            self._letters[token] = set(self._tokenizer.decode([token], skip_special_tokens=True))
        return self._letters[token]
