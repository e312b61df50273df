"""Which element types PyTorch multiplies fast on this machine's processor.

A processor without a unit for bfloat16 multiplies it through conversions, at a tenth of float32's speed and less. What
weights are stored in is then not what they should be multiplied in.
"""

from __future__ import annotations

import functools
import time

import torch
from torch.nn import functional as F

from cogsym.ops import cpp

_ROUNDS = 3
_ENOUGH = (
    0.7  # of float32's speed: equal speeds must not fall to either side by chance, as 16 bits take half the memory
)
_SIZE = 384  # rows, inputs and outputs of the product that is timed: well under a millisecond in float32
_UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "fp16")}


@functools.cache
def native(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of this type on the CPU take hardly longer than those of float32, or less.

    Timed once, in some 20 ms: what a processor has says what to expect, but not whether PyTorch uses it.
    """
    if dtype not in _UNITS:
        return True
    return relative_speed(dtype) > _ENOUGH


def why_not_native(dtype: torch.dtype) -> str:
    """Why products of this type are slow here, one phrase."""
    name = str(dtype).removeprefix("torch.")
    if cpp.extension is not None and not set(_UNITS[dtype]) & set(cpp.extension.cpu_features()):
        return f"this processor has no {name} unit"
    return f"PyTorch multiplies {name} {1 / relative_speed(dtype):.1f} times slower than float32 here"


def relative_speed(dtype: torch.dtype) -> float:
    """How many products of this type the CPU makes in the time of one of float32."""
    return _seconds(torch.float32) / _seconds(dtype)


@functools.cache
def _seconds(dtype: torch.dtype) -> float:
    """The time of a product."""
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(_SIZE, _SIZE).to(dtype)
    best = float("inf")
    with torch.no_grad():
        F.linear(x, x)
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            F.linear(x, x)
            best = min(best, time.perf_counter() - begin)
    return best
