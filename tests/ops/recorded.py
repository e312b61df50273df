"""What an operation's declared example calls: every registered operation with its arguments, gradients included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogsym.ops import Operation
from cogsym.ops.operation import Example, Sizes

TINY = Sizes(rows=1, length=5, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24, vocabulary=40)


class Calls(TorchDispatchMode):
    """Lists the calls of registered operations that are not PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace not in ("aten", "prim", "profiler"):
            self.made.append((function, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return function(*args, **(kwargs or {}))


def example_of(operation: Operation, dtype: torch.dtype = torch.float32, sizes: Sizes = TINY) -> Example:
    """On the CPU."""
    assert operation.example
    return operation.example(sizes, dtype, torch.device("cpu"))


def run(example: Example) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = example.ours(**example.inputs)
    wanted = [example.inputs[name] for name in example.differentiated]
    if not wanted:
        return list(outputs)
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return [o.detach() for o in outputs] + list(grads)


def calls(operation: Operation) -> list[tuple[Any, tuple[Any, ...]]]:
    """(overload, arguments) of each call that the example makes."""
    example = example_of(operation)
    with Calls() as recorded:
        run(example)
    return recorded.made
