"""A case for `test_fuzz.py`, and what its strategies draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Tensors = dict[str, Tensor]
Compute = Callable[..., tuple[Tensor, ...]]


@dataclass
class Case:
    """One shape of one operation.

    Attributes:
        draw: makes its tensors, float64 but for indices, anew at every call.
        ours: the operation, of the tensors.
        plain: plain PyTorch, of the tensors and of the dtype that a result in between has in memory.
        outputs: names of what both return.
        differentiated: the tensors that get a gradient.
        terms: of the float64 tensors, dout among them, and float64 results: magnitudes of what a named result sums up.
        blocks: rows and columns of a block of logits, or None: as in use.
    """

    draw: Callable[[], Tensors]
    ours: Compute
    plain: Compute
    outputs: tuple[str, ...]
    differentiated: tuple[str, ...] = ()
    terms: Callable[[Tensors, Tensors], Tensors] = lambda tensors, results: {}
    blocks: tuple[int, int] | None = None


def values(draw: Any, largest: int = 3) -> Callable[..., Tensor]:
    """A way to draw tensors: of a magnitude up to 2^largest, with long tails or without, all of one sign or not."""
    scale = 2.0 ** draw(st.integers(-4, largest))
    kind = draw(st.sampled_from(("normal", "tails", "positive", "few")))

    def make(*shape: int) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64)
        if kind == "tails":
            x = (x * x.abs()).clamp(-8, 8)
        if kind == "positive":
            x = x.abs()
        if kind == "few":
            x = x.round()
        return scale * x

    return make


def sizes(most: int) -> st.SearchStrategy[int]:
    """Small ones, and some that blocks and vectors do not divide."""
    return st.one_of(st.integers(1, min(most, 9)), st.integers(1, most))


def chosen(draw: Any, *names: str) -> tuple[str, ...]:
    """Those that get a gradient, one at least."""
    return tuple(sorted(draw(st.sets(st.sampled_from(names), min_size=1)), key=names.index))
