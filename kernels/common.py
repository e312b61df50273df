"""What the launch functions share: where a kernel runs, how many programs fill the chip, how a tensor's rows lie."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from cogsym.errors import CogsymError

# Read when the kernels are decorated, as Triton itself does: later changes of the variable have no effect.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which Triton launches on the device of `tensor`: it uses the current device, whatever it is given.

    Raises:
        CogsymError: the tensor is on the CPU, and Triton is not in its interpreter.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise CogsymError(
            "A Triton kernel was asked for tensors on the CPU, expected a GPU; unset COGSYM_BACKEND, "
            "or set TRITON_INTERPRET=1 to run kernels in Triton's slow interpreter."
        )
    return nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD) of a GPU, and a small number anywhere else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where neighbours in its last dimension are neighbours in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Rows:
    """How the rows [..., D] of several tensors of one shape lie in memory, without copying what need not be copied.

    Row n of a tensor starts at ``n // inner * outer_stride + n % inner * inner_stride``. `inner` is 1 where one stride
    steps through all rows of every tensor (contiguous tensors, the halves of a fused [..., 2F] product), and the size
    of the last dimension but one otherwise (heads sliced from a fused projection). Only a tensor that fits neither is
    copied.
    """

    def __init__(self, *tensors: Tensor) -> None:
        shape = tensors[0].shape
        self.count = shape[:-1].numel()
        self.tensors = [inner_contiguous(tensor) for tensor in tensors]
        self.inner = 1
        if any(_leading_stride(t, t.dim() - 1) is None for t in self.tensors):
            self.inner = shape[-2]
            self.tensors = [t if _leading_stride(t, t.dim() - 2) is not None else t.contiguous() for t in self.tensors]

    def strides(self, index: int) -> tuple[int, int]:
        """(outer_stride, inner_stride) of tensor `index`, in elements."""
        tensor = self.tensors[index]
        leading = tensor.dim() - 1 if self.inner == 1 else tensor.dim() - 2
        stride = _leading_stride(tensor, leading)
        assert stride is not None
        return stride, 0 if self.inner == 1 else tensor.stride(-2)


def _leading_stride(tensor: Tensor, dims: int) -> int | None:
    """The one stride that steps through the first `dims` dimensions in order, or None where there is none."""
    step, extent = None, 0
    for size, stride in zip(reversed(tensor.shape[:dims]), reversed(tensor.stride()[:dims]), strict=True):
        if size == 1:
            continue
        if step is None:
            step, extent = stride, stride * size
        elif stride != extent:
            return None
        else:
            extent *= size
    return step or 0
