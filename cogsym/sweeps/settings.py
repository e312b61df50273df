"""How a sweep runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from cogsym.errors import SettingError
from cogsym.sweeps.engine.sampling import Sampling
from cogsym.sweeps.layers.actions import SKIP


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep runs.

    Attributes:
        action: what "input", "output", "grid" ... do to the layers they choose.
        remove: how many layers a search takes away; None is half of them.
        width: how many sets of layers a beam search follows; None is four.
        sampling: how tokens are chosen where the model writes.
        truncate: read documents that are longer than the context in windows, or cut their beginnings; else they are
            refused.
        separator: the token before each document; None leaves it to the task and the tokenizer.
        memory_budget: bytes for states, keys and values; None is half of what is free. What a document takes by itself
            is taken, with a warning.
        strict_memory: refuse documents that take more than the budget by themselves.
        stream: read the layers one at a time from the checkpoint; None does so where the model does not fit.
        dtype: of the weights and of what is computed; None takes the checkpoint's own for the weights, and multiplies
            them in float32 where a processor is faster with that.
        weights: "int8" holds the layers' linear maps in 8 bits, with a scale a row (`cogsym.ops.int8_linear`).
    """

    action: str = SKIP
    remove: int | None = None
    width: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    truncate: bool = False
    separator: str | None = None
    memory_budget: int | None = None
    strict_memory: bool = False
    stream: bool | None = None
    dtype: torch.dtype | None = None
    weights: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if self.weights not in (None, "int8"):
            raise SettingError("weights", f"is {self.weights!r}, expected int8, or none at all.")
