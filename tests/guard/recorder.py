"""What the operations' examples call of the C++ extension: each kernel with its arguments and the memory they name.

Recorded where torch is, and called again by callgrind.py where it is not.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from cogsym.ops import cpp, operations
from cogsym.ops.operation import Example, Sizes


class Call(NamedTuple):
    """One call of a kernel."""

    label: str  # the kernel, the dtype, and what tells it from its other calls
    kernel: str
    arguments: tuple[Any, ...]
    memory: dict[int, bytes]  # by the address where it lay
    addresses: tuple[int, ...]  # places of the arguments that are addresses


class Recorder:
    """Stands in for the extension."""

    def __init__(self, extension: Any, dtype: str) -> None:
        self._extension, self._dtype = extension, dtype
        self._described = {name: arguments for name, _, arguments in extension.signatures()}
        self._storages: dict[int, int] = {}
        self.calls: dict[str, Call] = {}

    def remember(self, base: int, size: int) -> None:
        """That a tensor's memory lies there, and no longer what lay there before."""
        for other, length in list(self._storages.items()):
            if other < base + size and base < other + length:
                del self._storages[other]
        self._storages[base] = size

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._extension, name)
        if name not in self._described:
            return kernel

        def call(*arguments: Any) -> Any:
            self._record(name, arguments)
            return kernel(*arguments)

        return call

    def _record(self, name: str, arguments: tuple[Any, ...]) -> None:
        kinds = [kind for _, kind in self._described[name]]
        named = {argument: value for (argument, _), value in zip(self._described[name], arguments, strict=True)}
        addresses = tuple(i for i, kind in enumerate(kinds) if kind == "address")
        # Kernels skip what is not asked for: calls with other gaps and switches are other measurements.
        absent = [argument for argument, kind in self._described[name] if kind == "address" and not named[argument]]
        switches = [argument for argument, kind in self._described[name] if kind == "bool" and named[argument]]
        told = [name, self._dtype, *(f"no {argument}" for argument in absent), *switches]
        held = {}
        for i in addresses:
            for base, size in self._storages.items():
                if base <= arguments[i] < base + size:
                    held[base] = ctypes.string_at(base, size)
        label = ", ".join(told)
        self.calls.setdefault(label, Call(label, name, arguments, held, addresses))


def record(rows: int) -> list[Call]:
    """The calls of every operation's example on so many tokens, in float32 and in bfloat16, without a gradient for
    weights and with one for everything."""
    # Of a model's proportions, and small: instructions are counted a thousand times slower than they run.
    sizes = Sizes(1, rows, width=192, heads=2, kv_heads=1, head_dim=64, mlp_width=256, vocabulary=512)
    found: list[Call] = []
    data_ptr = Tensor.data_ptr
    for dtype in (torch.float32, torch.bfloat16):
        recorder = Recorder(cpp.extension, str(dtype).removeprefix("torch."))

        def logged(x: Tensor, recorder: Recorder = recorder) -> int:
            storage = x.untyped_storage()
            recorder.remember(storage.data_ptr(), storage.nbytes())
            return data_ptr(x)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(cpp, "extension", recorder))
            stack.enter_context(mock.patch.object(Tensor, "data_ptr", logged))
            for module in ("linear", "int8_linear"):  # the same calls on every processor
                stack.enter_context(mock.patch.object(sys.modules[f"cogsym.ops.{module}"], "native", lambda _: True))
            for operation in operations().values():
                if operation.example is not None:
                    torch.manual_seed(0)
                    example = operation.example(sizes, dtype, torch.device("cpu"))
                    _run(example, example.differentiated)
                    if example.differentiated:
                        _run(example, tuple(n for n, x in example.inputs.items() if x.is_floating_point()))
        found += recorder.calls.values()
    return found


def _run(example: Example, differentiated: tuple[str, ...]) -> None:
    inputs = {name: x.detach() for name, x in example.inputs.items()}
    for name in differentiated:
        # cos and sin have no gradient, which rotary says.
        if not name.startswith(("cos", "sin")):
            inputs[name].requires_grad_()
    outputs = example.ours(**inputs)
    wanted = [x for x in inputs.values() if x.requires_grad]
    if wanted:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True)
