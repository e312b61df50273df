"""What each frozen layer keeps: bytes and repeated arithmetic of every choice, and the mix that fits a budget.

The counts are exact, and tests hold them against what saved-tensor hooks and PyTorch's FLOP counter see. A token's
share of attention is that of a full row of its length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogsym.errors import SettingError
from cogsym.memory import free_bytes
from cogsym.models.block import Block
from cogsym.models.half import Dial
from cogsym.training.autograd import KEEPS, Keep


@dataclass(frozen=True)
class Cost:
    """What one frozen layer costs with one choice of what it keeps.

    Attributes:
        bytes_per_token: held for the backward pass on the layer's device. With "nothing" only the first layer of a run
            holds any.
        flops: of forward, input gradient and what is repeated, for one row of T tokens.
        repeated: the repeated ones among them. With "nothing" the run's second forward pass is not among them: it
            depends on the run (`run_flops`).
    """

    bytes_per_token: int
    flops: int
    repeated: int


def cost(
    block: Block,
    keep: Keep,
    length: int,
    element_size: int,
    first_of_run: bool = True,
    stream_size: int | None = None,
) -> Cost:
    """What `block` costs with `keep`.

    Args:
        block: a frozen block.
        keep: what it keeps.
        length: T.
        element_size: bytes of an element of the products, 2 for bfloat16.
        first_of_run: whether a layer that keeps nothing begins its run.
        stream_size: bytes of an element of the residual stream, where it is in another dtype than the products, as
            float32 embeddings make it under bfloat16 autocast.
    """
    stream_size = stream_size or element_size
    dial: Dial = keep if keep in ("all", "attention") else "input"
    repeated = block.repeated_flops(dial, length)
    input_alone = block.kept_bytes("input", element_size, stream_size)
    held = {"offload": 0, "nothing": input_alone if first_of_run else 0}.get(
        keep, block.kept_bytes(dial, element_size, stream_size)
    )
    return Cost(held, block.forward_flops(length) + block.gradient_flops(length) + repeated, repeated)


def run_flops(blocks: Sequence[Block], length: int) -> int:
    """What a run of blocks that keep nothing repeats besides, to compute their inputs again."""
    n = len(blocks)
    size = math.isqrt(n - 1) + 1
    # All but the last once; then, but for the last segment, whose inputs were kept, all but each segment's last again.
    last = (n - 1) // size * size
    again = [*range(n - 1)] + [j for j in range(last) if (j + 1) % size]
    return sum(blocks[j].forward_flops(length) for j in again)


def inputs_at_once(n: int) -> int:
    """How many inputs of a run of n blocks that keep nothing are there at once, at the most, while it goes backward."""
    size, there, most = math.isqrt(max(n - 1, 0)) + 1, {0}, 1
    for i in reversed(range(n)):
        if i not in there:
            segment, begin = i // size * size, max(j for j in there if j < i)
            there |= {j for j in range(begin + 1, i + 1) if j >= segment or j % size == 0}
        most = max(most, len(there))
        there.discard(i)
    return most


def choose(
    blocks: Mapping[int, Block],
    tokens: int,
    length: int,
    element_size: int,
    budget: int,
    stream_size: int | None = None,
) -> dict[int, Keep]:
    """What each frozen layer keeps so that together they fit `budget` bytes with few FLOPs repeated.

    Every layer starts with "all". The step that frees the most bytes for a FLOP repeated is taken first, in the lowest
    layer of those that are equal, until it fits. Where "input" everywhere does not, the lowest layers keep "nothing",
    as few of them as fit: what the others keep is gone by the time they are computed again. The order of the steps
    does not depend on the budget, so that a larger one never keeps less or repeats more.

    Args:
        blocks: the frozen layers through which a gradient flows, by index.
        tokens: of a batch.
        length: T, of a row.
        element_size, stream_size: as `cost` has them.
        budget: bytes. Where it is less than any choice can do with, that which holds the least at once is made.
    """
    ladder: tuple[Keep, ...] = ("all", "attention", "input")
    costs = {
        i: [cost(block, keep, length, element_size, stream_size=stream_size) for keep in ladder]
        for i, block in blocks.items()
    }
    rung = dict.fromkeys(blocks, 0)

    def gain(i: int) -> float:
        here, below = costs[i][rung[i]], costs[i][rung[i] + 1]
        return (here.bytes_per_token - below.bytes_per_token) / max(below.repeated - here.repeated, 1)

    held = tokens * sum(c[0].bytes_per_token for c in costs.values())
    while held > budget:
        steps = [i for i in blocks if rung[i] + 1 < len(ladder)]
        if not steps:
            inputs = {i: tokens * c[-1].bytes_per_token for i, c in costs.items()}
            lowest = _keeping_nothing(inputs, budget)
            return {i: "nothing" if i in lowest else "input" for i in blocks}
        i = max(steps, key=gain)
        held -= tokens * (costs[i][rung[i]].bytes_per_token - costs[i][rung[i] + 1].bytes_per_token)
        rung[i] += 1
    return {i: ladder[r] for i, r in rung.items()}


def _keeping_nothing(inputs: Mapping[int, int], budget: int) -> set[int]:
    """The lowest layers that keep nothing: as few as fit, or those with which the least is held at once.

    Args:
        inputs: bytes of each layer's input, by index.
        budget: bytes.
    """
    order, most = sorted(inputs), {}
    for n in range(2, len(order) + 1):  # a run of one keeps its input
        most[n] = most_held(inputs, order[:n])
        if most[n] <= budget:
            return set(order[:n])
    return set(order[: min(most, key=most.__getitem__)]) if most else set(order)


def most_held(inputs: Mapping[int, int], nothing: Sequence[int]) -> int:
    """Bytes held at the most where some layers keep nothing and those above them their input.

    Args:
        inputs: bytes of each layer's input, by index.
        nothing: the layers that keep nothing, the lowest ones, in order.
    """
    runs: list[list[int]] = []
    for i in nothing:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    firsts = [inputs[run[0]] for run in runs]
    while_going_back = [
        sum(firsts[:k]) + inputs_at_once(len(run)) * max(inputs[i] for i in run) for k, run in enumerate(runs)
    ]
    return max(sum(firsts) + sum(size for i, size in inputs.items() if i not in nothing), *while_going_back)


class Memory:
    """The choice for all frozen layers of one prepared model.

    Args:
        keep: one of `KEEPS`, or "auto".
        budget: bytes that the frozen layers may hold for the backward pass, for "auto"; None is half of what is free
            when a batch of a new shape first comes, gradients and an optimizer's states that are yet to come not
            counted as free, the other half being left to the trained layers and the head.

    Raises:
        CogsymError: an unknown `keep`, or a budget that is not positive or not for "auto".
    """

    def __init__(self, keep: str, budget: int | None) -> None:
        if keep != "auto" and keep not in KEEPS:
            raise SettingError("keep", f"is {keep!r}, expected one of auto, {', '.join(KEEPS)}.")
        if budget is not None and (keep != "auto" or budget <= 0):
            raise SettingError(
                "memory_budget", f"is {budget} where keep is {keep!r}, expected a positive number of bytes for 'auto'."
            )
        self.keep, self.budget = keep, budget
        self.blocks: dict[int, Block] = {}  # the frozen layers that decide, by index
        self.trained: list[Tensor] = []  # the parameters
        self.shape: tuple[int, int] | None = None  # of the batch that the choice is for
        self.sizes: tuple[int, int] | None = None  # bytes of an element of its products and of its residual stream
        self._chosen: dict[tuple[int, int], dict[int, Keep]] = {}

    def check(self, device: str) -> None:
        """Raise a CogsymError where a model on this type of device cannot do what was chosen."""
        if self.keep == "offload" and device != "cuda":
            raise SettingError(
                "keep",
                f"is 'offload' and the model is on {device}, expected a GPU, whose activations wait in the host's "
                "memory; on a CPU use 'input' or 'nothing'.",
            )

    def of(self, index: int, x: Tensor) -> Keep:
        """What layer `index` keeps of a batch whose residual stream is x, [B, T, D]."""
        self.check(x.device.type)
        autocast = torch.is_autocast_enabled(x.device.type)
        products = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        self.sizes = (products.itemsize, x.element_size())
        if self.keep != "auto":
            return self.keep  # type: ignore[return-value]
        self.shape = (x.shape[0], x.shape[1])
        if self.shape not in self._chosen:
            graph = {i: block for i, block in self.blocks.items() if i >= index}
            budget = self.budget or (free_bytes(x.device) - self._awaited()) // 2
            self._chosen[self.shape] = choose(
                graph, x.shape[0] * x.shape[1], x.shape[1], self.sizes[0], budget, stream_size=self.sizes[1]
            )
        return self._chosen[self.shape].get(index, "input")

    def _awaited(self) -> int:
        """Bytes of gradients that are not there, and before the first step of AdamW's states, two a parameter."""
        gradients = sum(p.nbytes for p in self.trained if p.grad is None)
        return gradients + (0 if self._chosen else 2 * sum(p.nbytes for p in self.trained))

    def least(self, first: int, rows: int, length: int, element_size: int) -> int:
        """Bytes that the frozen layers from `first` on hold of such a batch whatever is chosen: a run's input each."""
        runs = [i for i in self.blocks if i >= first and (i - 1 not in self.blocks or i == first)]
        return sum(rows * length * cost(self.blocks[i], "nothing", length, element_size).bytes_per_token for i in runs)

    def last(self, index: int) -> Keep | None:
        """What layer `index` keeps of batches like the last one; None where that is not decided yet."""
        if self.keep != "auto":
            return self.keep  # type: ignore[return-value]
        chosen: Any = self._chosen.get(self.shape) if self.shape else None
        return chosen.get(index) if chosen else None
