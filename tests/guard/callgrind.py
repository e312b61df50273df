"""Runs under valgrind and without torch: calls every C++ kernel on one thread, on memory of its own.

    python callgrind.py EXTENSION ISA ROWS

prints what it will call, then calls it. Every call of the extension ends in a dump of callgrind's: the first is that of
`set_isa`, then each kernel has two, the second with its addresses resolved.
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import math
import sys
from typing import Any

FLOAT32, BFLOAT16 = 0, 1
ELEMENT = {FLOAT32: 4, BFLOAT16: 2}


class Memory:
    """Buffers at multiples of 64 bytes, filled with a wave or with zeros."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def room(self, size: int) -> int:
        """So many bytes of zeros."""
        buffer = ctypes.create_string_buffer(size + 64)
        self._held.append(buffer)
        return (ctypes.addressof(buffer) + 63) // 64 * 64

    def integers(self, values: list[int]) -> int:
        """int64."""
        address = self.room(8 * len(values))
        ctypes.memmove(address, array.array("q", values).tobytes(), 8 * len(values))
        return address

    def wave(self, count: int, dtype: int) -> int:
        """Numbers between -1 and 1."""
        period = array.array("f", [math.sin(0.37 * i) for i in range(1021)])  # longer is slow under valgrind
        data = (period * (count // 1021 + 1))[:count].tobytes()
        if dtype == BFLOAT16:
            halves = memoryview(data).cast("H")
            data = array.array("H", halves[1::2]).tobytes()
        address = self.room(len(data))
        ctypes.memmove(address, data, len(data))
        return address


def kernels(extension: Any, m: Memory, dtype: int, rows: int) -> dict[str, Any]:
    """Each kernel as a call without arguments, on what `m` holds."""
    D, F, V = 192, 256, 512
    size = ELEMENT[dtype]
    x, y, dy, h = (m.wave(rows * D, dtype) for _ in range(4))
    weight, dweight = m.wave(D, FLOAT32), m.room(4 * D)
    gate, up, dz = (m.wave(rows * F, dtype) for _ in range(3))
    dgate_up = m.room(2 * rows * F * size)
    T, H, KV, d = rows, 2, 1, 64
    q, o, do, dq = (m.wave(T * H * d, dtype) for _ in range(4))
    k, v, dk, dv = (m.wave(T * KV * d, dtype) for _ in range(4))
    cos, lse = m.wave(T * d // 2, FLOAT32), m.room(4 * H * T)
    logits, logits2, product = m.wave(rows * V, dtype), m.wave(rows * V, dtype), m.wave(rows * D, dtype)
    targets, sums = m.room(8 * rows), [m.room(4 * rows) for _ in range(6)]
    total = m.room(4 * rows * D)
    heads, groups = (T * H * d, H * d, d), (T * KV * d, KV * d, d)
    attention = (q, heads, k, groups, v, groups, 0, 1, T, H, KV, d, d**-0.5, 0, 0.0, dtype, 1, o, lse)
    begins, ends = m.integers([0, T // 2] * 8), m.integers([T // 3, T] * 8)
    decode = (q, heads[1:], k, groups[1:], v, groups[1:], begins, ends, 0, 8, 2, H, KV, d, d**-0.5, 0.0, dtype, 1, o)
    return {
        "rms_norm": lambda: extension.rms_norm(x, D, dy, D, weight, y, h, rows, D, 1e-5, 0.0, dtype, FLOAT32, 1),
        "rms_norm_backward": lambda: extension.rms_norm_backward(
            dy, D, h, D, x, D, weight, y, dweight, rows, D, 1e-5, 0.0, dtype, FLOAT32, 1
        ),
        "rotary": lambda: extension.rotary(
            q, heads, cos, (0, d // 2), cos, (0, d // 2), dq, 1, T, H, d, d // 2, False, False, dtype, FLOAT32, 1
        ),
        "gated_activation": lambda: extension.gated_activation(gate, F, up, F, dgate_up, rows, F, 0, dtype, 1),
        "gated_activation_backward": lambda: extension.gated_activation_backward(
            dz, F, gate, F, up, F, dgate_up, dgate_up + F * size, 2 * F, rows, F, 0, dtype, 1
        ),
        "attention": lambda: extension.attention(*attention, 0),
        "attention_backward": lambda: extension.attention_backward(*attention, do, heads, dq, dk, dv),
        "decode_attention": lambda: extension.decode_attention(*decode),
        "online_softmax": lambda: extension.online_softmax(
            logits, targets, *sums[:4], 0, 0, rows, V, 0, 1.0, 0.0, True, dtype, 1
        ),
        "add_rescaled": lambda: extension.add_rescaled(total, product, sums[3], rows, D, dtype, 1),
        "logits_gradient": lambda: extension.logits_gradient(
            logits2, targets, sums[4], sums[5], rows, V, 0, 1.0, 0.0, 1.0, 0.0, dtype, 1
        ),
    }


def main() -> None:
    """Call them all."""
    path, isa, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec and spec.loader
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.set_isa(isa)
    memory, calls = Memory(), []
    for dtype, name in ((FLOAT32, "float32"), (BFLOAT16, "bfloat16")):
        assert extension.DTYPES[dtype] == name
        for kernel, call in kernels(extension, memory, dtype, rows).items():
            print(f"{kernel}, {name}")
            calls.append(call)
    for call in calls:
        for _ in range(2):
            call()


if __name__ == "__main__":
    main()
