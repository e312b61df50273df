"""Compiles Triton kernels for chips that are not here, exactly as their launch functions would launch them.

`launches` runs launch functions on meta tensors and records each kernel with its arguments; `compile_for` specialises
and compiles one as Triton's launcher would; `resources` reads registers, spills and shared memory from the binary.

    python tests/kernels/aot.py

prints them for every kernel and target.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from cogsym.kernels import activation, attention, decode_attention, int8_linear, linear_cross_entropy, rms_norm, rotary
from cogsym.ops import Operation, operations
from cogsym.ops.activation import ACTIVATIONS
from cogsym.ops.logit_blocks import OnlineState
from cogsym.ops.operation import Sizes

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS = ("num_warps", "num_stages", "num_ctas")
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Launch:
    """One kernel launch: what `kernel[grid](*args, **kwargs)` was given."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of spilled registers a thread, shared bytes a block."""

    registers: int
    spilled: int
    shared: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are listed, not run."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compile_for(target: GPUTarget, launch: Launch) -> CompiledKernel:
    """Specialised as Triton's launcher does: 1 and None are constants; multiples of 16 and tensors are aligned."""
    options = {name: launch.kwargs[name] for name in OPTIONS if name in launch.kwargs}
    given = {name: value for name, value in launch.kwargs.items() if name not in OPTIONS}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | given
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        aligned = True
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            raise TypeError(f"{parameter.name} is {value!r}: pass floating-point scalars as constexpr.")
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(launch.kernel, signature, constants, attributes), target=target, options=options)


def resources(compiled: CompiledKernel) -> Resources:
    """Read from the binary itself, by cuobjdump for NVIDIA and from the assembly's metadata for AMD."""
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        # These kernels have no arrays of their own: all that is on the stack or in local memory was spilled.
        field = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        return Resources(field["REG"], field["STACK"] + field["LOCAL"], compiled.metadata.shared)
    assembly = compiled.asm["amdgcn"]
    field = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * field["vgpr_spill_count"] + field["private_segment_fixed_size"] + 4 * field["sgpr_spill_count"]
    return Resources(field["vgpr_count"], spilled, compiled.metadata.shared)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _rms_norm_forward(D: int, dtype: torch.dtype) -> None:
    x, weight = _empty(8, 1024, D, dtype=dtype), _empty(D, dtype=dtype)
    rms_norm.rms_norm(x, weight, 1e-5, 0.0)
    rms_norm.add_rms_norm(x, x, weight, 1e-5, 1.0)


def _rms_norm(D: int, dtype: torch.dtype) -> None:
    _rms_norm_forward(D, dtype)
    x, weight = _empty(8, 1024, D, dtype=dtype), _empty(D, dtype=dtype)
    rms_norm.rms_norm_backward(x, x, weight, 1e-5, 0.0, x, True, True)


def _frozen_norm(D: int, dtype: torch.dtype) -> None:
    """Not every gradient is needed."""
    x, weight = _empty(8, 1024, D, dtype=dtype), _empty(D, dtype=dtype)
    rms_norm.rms_norm_backward(x, x, weight, 1e-5, 0.0, None, True, False)
    rms_norm.rms_norm_backward(x, x, weight, 1e-5, 0.0, None, False, True)


def _head_norm(D: int, dtype: torch.dtype) -> None:
    """q and k norms, on heads sliced from a fused projection, with float32 weights."""
    heads = _empty(8, 1024, 48, D, dtype=dtype)[:, :, :32]
    weight = _empty(D, dtype=torch.float32)
    rms_norm.rms_norm(heads, weight, 1e-6, 0.0)
    rms_norm.rms_norm_backward(heads, heads, weight, 1e-6, 0.0, None, True, True)


def _rotary(D: int, dtype: torch.dtype) -> None:
    """Whole and partial."""
    heads = _empty(8, 1024, 48, D, dtype=dtype)[:, :, :40]
    for half in (D // 8, D // 2):
        angles = _empty(1, 1024, half, dtype=torch.float32)
        rotary.rotary(heads, angles, angles, interleaved=False, inverse=True)
    rotary.rotary(heads, angles, angles, interleaved=True, inverse=False)


def _gated_activation(F: int, dtype: torch.dtype) -> None:
    """On the halves of a fused product."""
    gate, up = _empty(8, 1024, 2 * F, dtype=dtype).chunk(2, -1)
    for kind in ("silu", "gelu_tanh"):
        activation.gated_activation(gate, up, kind)
        activation.gated_activation_backward(gate, gate, up, kind, True, True)
    for need_dgate in (True, False):
        activation.gated_activation_backward(gate, gate, up, "silu", need_dgate, not need_dgate)


def _activation(F: int, dtype: torch.dtype) -> None:
    """Without a gate."""
    x = _empty(8, 1024, F, dtype=dtype)
    for kind in ACTIVATIONS:
        activation.gated_activation(x, None, kind)
        activation.gated_activation_backward(x, x, None, kind, True, False)


def _linear_cross_entropy(D: int, dtype: torch.dtype) -> None:
    """Training with a frozen head and with a trained one, with and without a soft cap; scores."""
    rows, width = 4096, 16384
    logits, product = _empty(rows, width, dtype=dtype), _empty(rows, D, dtype=dtype)
    targets, total = _empty(rows, dtype=torch.int64), _empty(rows, D, dtype=torch.float32)
    row = _empty(rows, dtype=torch.float32)
    for soft_cap in (0.0, 30.0):
        linear_cross_entropy.online_softmax(
            logits, width, targets, OnlineState(row, row, row, None, None), row, 1.0, soft_cap, True
        )
        linear_cross_entropy.online_softmax(
            logits, 0, targets, OnlineState(row, row, row, row, targets), row, 1.0, soft_cap, False
        )
        linear_cross_entropy.logits_gradient(logits, width, targets, row, row, 1.0, soft_cap, 0.9, 1e-6)
    linear_cross_entropy.add_rescaled(total, product, row)


def _int8_linear(D: int, dtype: torch.dtype) -> None:
    """One row and many sequences' next ones, both ways."""
    weight, scale = _empty(3 * D, D, dtype=torch.int8), _empty(3 * D, dtype=torch.float32)
    for rows in (1, 32):
        int8_linear.int8_linear(_empty(rows, D, dtype=dtype), weight, scale, _empty(3 * D, dtype=dtype))
        int8_linear.int8_linear_input_gradient(_empty(rows, 3 * D, dtype=dtype), weight, scale)


def _decode_attention(heads: tuple[int, int], D: int, dtype: torch.dtype) -> None:
    """Many rows, and few rows of many keys under a soft cap, on slices of fused projections."""
    H, KV = heads
    sinks = _empty(H, dtype=dtype)
    for N, soft_cap, given in ((4096, None, None), (8, 50.0, None), (8, None, sinks)):
        q, store = _empty(N, H + 2 * KV, D, dtype=dtype)[:, :H], _empty(65536, 2, KV, D, dtype=dtype)
        ranges = _empty(N, 2, dtype=torch.int64)
        with mock.patch("cogsym.kernels.decode_attention.multiprocessors", return_value=132):
            decode_attention.decode_attention(q, store[:, 0], store[:, 1], ranges, ranges, given, D**-0.5, soft_cap)


def _attention(heads: tuple[int, int], D: int, dtype: torch.dtype) -> None:
    """Packed documents; a window, a soft cap and sinks: on slices of a fused projection, both ways."""
    B, T, (H, KV) = 2, 4096, heads
    q, k, v = _empty(B, T, H + 2 * KV, D, dtype=dtype).split((H, KV, KV), 2)
    out, starts, sinks = _empty(B, T, H, D, dtype=dtype), _empty(B, T, dtype=torch.int32), _empty(H, dtype=dtype)
    if dtype.itemsize > 2 and D > 64:
        return  # refused
    kinds = {64: ((starts, None, None, None), (None, sinks, 512, 50.0)), 256: ((None, sinks, 512, 50.0),)}
    for given, sink, window, soft_cap in kinds.get(D, ((starts, None, None, None),)):
        o, lse = attention.attention(q, k, v, given, sink, D**-0.5, window, soft_cap)
        attention.attention_backward(out, q, k, v, o, lse, given, D**-0.5, window, soft_cap, True, True, True)


def _declared(operation: Operation, width: int, dtype: torch.dtype) -> None:
    """An operation's example, both ways."""
    heads = width // 128
    sizes = Sizes(8, 1024, width, heads, max(1, heads // 4), 128, width * 7 // 2, 32000)
    example = operation.example(sizes, dtype, torch.device("meta"))
    with mock.patch.dict(os.environ, COGSYM_BACKEND="triton"):
        outputs = example.ours(**example.inputs)
        wanted = [example.inputs[name] for name in example.differentiated]
        torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs])


# Widths of SmolLM2-135M and of Llama 3.1 in 8B, 70B and beyond, and the heads and MLPs of these.
CASES: dict[tuple[str, int], Callable[[int, torch.dtype], None]] = {
    **{("rms_norm", D): _rms_norm for D in (576, 4096, 8192, 18432)},
    ("rms_norm_forward", 16384): _rms_norm_forward,
    ("frozen_norm", 4096): _frozen_norm,
    **{("head_norm", D): _head_norm for D in (64, 128)},
    **{("rotary", D): _rotary for D in (64, 128)},
    ("gated_activation", 14336): _gated_activation,
    ("activation", 14336): _activation,
    ("attention", 64): partial(_attention, (9, 3)),
    ("attention", 128): partial(_attention, (32, 8)),
    ("attention", 256): partial(_attention, (8, 4)),
    ("decode_attention", 64): partial(_decode_attention, (9, 3)),
    ("decode_attention", 128): partial(_decode_attention, (32, 8)),
    **{("int8_linear", D): _int8_linear for D in (576, 4096)},
    **{("linear_cross_entropy", D): _linear_cross_entropy for D in (576, 4096)},
}
# Every other operation that has a Triton kernel.
for _operation in operations().values():
    triton_kernel = _operation.example and any(b.name == "triton" for b in _operation.backends)
    if triton_kernel and not any(name == _operation.name for name, _ in CASES):
        CASES |= {(_operation.name, width): partial(_declared, _operation) for width in (1024, 4096, 16384)}


def launches(case: tuple[str, int], dtype: torch.dtype, target: str = "sm_90") -> list[Launch]:
    """Every kernel launch of one of `CASES`, as on a chip of `TARGETS`."""
    hip = "7.0" if TARGETS[target].backend == "hip" else None
    with recorded() as found, mock.patch.object(torch.version, "hip", hip):
        CASES[case](case[1], dtype)
    return found


def main() -> None:
    """Prints the table."""
    print(f"{'kernel':56}{'size':>7}  {'dtype':6}{'warps':>6}", *(f"{name:>20}" for name in TARGETS), sep="")
    print(f"{'':77}" + f"{'reg spl shared':>20}" * len(TARGETS))
    for case in CASES:
        for dtype in DTYPES:
            for at in zip(*(launches(case, dtype, name) for name in TARGETS), strict=True):
                found = at[0]
                kernel = f"{case[0]}: {found.kernel.__module__.split('.')[-1]}.{found.kernel.__name__}"
                cells = [resources(compile_for(t, each)) for t, each in zip(TARGETS.values(), at, strict=True)]
                row = "".join(f"{r.registers:10d}{r.spilled:4d}{r.shared:6d}" for r in cells)
                print(f"{kernel:56}{case[1]:>7}  {TYPE_NAMES[dtype]:6}{found.kwargs['num_warps']:>6}{row}", flush=True)


if __name__ == "__main__":
    main()
