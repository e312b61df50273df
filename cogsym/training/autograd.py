"""Frozen blocks under autograd: what is kept between the forward pass and the backward pass, and what is not.

`keep` says what the node of a frozen block holds on to (bytes in `cogsym.models.block`):

    "all"        everything its gradient needs; nothing is computed again
    "attention"  its input, the residual stream and attention's output; the products before are repeated
    "input"      its input; all but the down projection is repeated
    "offload"    its input, in pinned host memory; repeated like "input"
    "nothing"    nothing: the first block of an unbroken run of such blocks keeps its input, and the others' inputs are
                 computed from it in segments, one more forward pass of the run and no more than 2 √n inputs at a time

Blocks find the run they belong to through the graph itself: a block whose input was made by a node that keeps nothing
continues that node's run. So nothing is recorded between layers, and an output that something else reads along the way
is an ordinary tensor with an ordinary gradient.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal

import torch
from torch import Tensor

from cogsym.models.block import Block, KeptBlock
from cogsym.models.inputs import LayerInputs
from cogsym.training.streamed import StreamedBlock

Keep = Literal["all", "attention", "input", "offload", "nothing"]
KEEPS: tuple[Keep, ...] = ("all", "attention", "input", "offload", "nothing")


def run_frozen(block: Block | StreamedBlock, x: Tensor, inputs: LayerInputs, keep: Keep) -> Tensor:
    """The output of a block none of whose parameters needs a gradient, [B, T, D].

    Args:
        block: its projections must be plain `nn.Linear`, in memory or read when it runs.
        x: the residual stream, [B, T, D].
        inputs: the layer's keywords, with `positions` where attention is ours.
        keep: what is held until the backward pass, where `x` needs a gradient.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return block.run(x, inputs, "input")[0]
    run = None
    if keep == "nothing":
        run = _continued(x.grad_fn) or _Run()
        run.steps.append((block, inputs))
    return _FrozenBlock.apply(x, block, inputs, keep, run)


def _continued(node: Any) -> _Run | None:
    """The run that `node` ends, unless another block continues it already."""
    run = getattr(node, "run", None)
    return run if run is not None and len(run.steps) == node.place + 1 else None


class _Run:
    """Neighbouring blocks that keep nothing, and the inputs of some of them during a backward pass.

    Attributes:
        steps: the blocks, from the first on, with their keywords.
        first: a weak reference to the node of the first one, which keeps its input: the graph holds it.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[Block | StreamedBlock, LayerInputs]] = []
        self.first: weakref.ref[Any] | None = None
        self._inputs: dict[int, Tensor] = {}

    def input(self, i: int) -> Tensor:
        """The input of block `i`; blocks are asked for from the last to the first."""
        if i == 0:
            self._inputs.clear()
            return self._first()
        if i not in self._inputs:
            self._compute(i)
        return self._inputs.pop(i)

    def _first(self) -> Tensor:
        assert self.first is not None
        node: Any = self.first()
        x: Tensor = node.saved_tensors[0]
        return x

    def _compute(self, i: int) -> None:
        """The inputs of the segment that ends with block `i`, from the nearest one before it."""
        size = math.isqrt(len(self.steps) - 1) + 1
        begin = max((j for j in self._inputs if j < i), default=0)
        x = self._inputs[begin] if begin else self._first()
        segment = i // size * size
        for j in range(begin, i):
            block, inputs = self.steps[j]
            x, _ = block.run(x, inputs, "input")
            if j + 1 >= segment or (j + 1) % size == 0:
                self._inputs[j + 1] = x


class _FrozenBlock(torch.autograd.Function):
    """One frozen block; its only gradient is that of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Block | StreamedBlock, inputs: LayerInputs, keep: Keep, run: _Run | None
    ) -> Tensor:
        y, kept = block.run(x, inputs, keep if keep in ("all", "attention") else "input")
        ctx.block, ctx.inputs, ctx.run = block, inputs, run
        ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        ctx.device = x.device
        if run is not None:
            ctx.place = len(run.steps) - 1
            if ctx.place == 0:
                run.first = weakref.ref(ctx)
                ctx.save_for_backward(x)
            return y
        if keep == "offload":
            # The copies both ways are queued on the stream that computes: in order, and no fence is needed.
            kept.x = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        ctx.names = tuple(kept.attention), tuple(kept.mlp)
        ctx.save_for_backward(kept.x, kept.h, *kept.attention.values(), *kept.mlp.values())
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        enabled, dtype = ctx.autocast
        with torch.autocast(ctx.device.type, dtype=dtype, enabled=enabled):
            if ctx.run is not None:
                kept = KeptBlock(ctx.run.input(ctx.place))
            else:
                x, h, *rest = ctx.saved_tensors
                of_attention, of_mlp = ctx.names
                between = len(of_attention)
                kept = KeptBlock(
                    x.to(ctx.device, non_blocking=True),
                    h,
                    dict(zip(of_attention, rest[:between], strict=True)),
                    dict(zip(of_mlp, rest[between:], strict=True)),
                )
            return ctx.block.input_gradient(dy, kept, ctx.inputs), None, None, None, None
