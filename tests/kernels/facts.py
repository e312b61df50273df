"""What the compiler made of each kernel for sm_90 in bfloat16, and an estimate of what an H100 could get out of it.

    python tests/kernels/facts.py

compiles every launch of `aot.CASES` and writes the table of docs/kernels.md. Everything in it but the last column is
read from the binary and its PTX. The last one is an estimate from these facts and the chip's data sheet: compiled, not
run.

Where there are fewer than `INTENSE` FLOPs of tensor cores for a byte that is loaded, memory bounds a kernel. It can be
at its limit where enough bytes are on their way (Little's law): resident threads, by registers, shared memory and
warps, times the bytes that one loads between two barriers, over `LATENCY` times a multiprocessor's share of the
bandwidth. Copies get as far as `STREAMING`, and so does a kernel at most for which that ratio is 1 or more. Elsewhere
it is the time that the tensor cores take over that of all units, once as if no two worked at the same time and once as
if all did: the share is somewhere between.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import aot
import torch
import triton

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
TARGET = "sm_90"
# An H100 SXM: of one multiprocessor, and the whole chip's memory.
REGISTERS, SHARED, WARPS, BLOCKS, MULTIPROCESSORS = 65536, 227 * 1024, 64, 32, 132
BANDWIDTH, LATENCY, CLOCK = 3.35e12, 600e-9, 1.83e9  # B/s, s, Hz
STREAMING, INTENSE = 0.93, 20
# FLOPs of tensor cores in bfloat16, float32 instructions and exponentials of a cycle.
TENSOR_FLOPS, LANES, EXPONENTIALS = 4096, 128, 16
WARPS_OF_GROUP = 4  # that multiply together with wgmma

_LOAD = re.compile(r"ld\.global(?:[.:]+[\w:]*?)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)")
_MULTIPLY = re.compile(r"(wgmma\.mma_async|mma)\.sync\S*?\.m(\d+)n(\d+)k(\d+)")
_FLOAT = re.compile(r"\b(?:add|sub|mul|fma|max|min|div|sqrt|setp|selp|cvt)\b\S*\.(?:f32|bf16x?2?)\b")


@dataclass(frozen=True)
class Facts:
    """Of one compiled kernel.

    Attributes:
        resources: registers, spills and shared memory.
        warps: of a block.
        loads: how many instructions of a thread load so many bytes from global memory.
        between_barriers: the most bytes that a thread asks for from one barrier to the next.
        multiplications: tensor-core instructions by name.
        tensor_flops: of them all, of one warp.
        floats: float32 instructions and conversions of a thread.
        exponentials: those that go to the special function unit.
    """

    resources: aot.Resources
    warps: int
    loads: Counter[int]
    between_barriers: int
    multiplications: Counter[str]
    tensor_flops: float
    floats: int
    exponentials: int

    @property
    def resident_warps(self) -> int:
        """Of a multiprocessor."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.resources.registers // 8) * 8 * threads)
        by_shared = SHARED // (self.resources.shared + 1024)
        return self.warps * min(by_registers, by_shared, WARPS // self.warps, BLOCKS)

    def estimate(self) -> str:
        """The last column."""
        if self.tensor_flops > INTENSE * 32 * sum(size * n for size, n in self.loads.items()):
            times = [self.tensor_flops / TENSOR_FLOPS, 32 * self.floats / LANES, 32 * self.exponentials / EXPONENTIALS]
            return f"{times[0] / sum(times):.0%} to {times[0] / max(times):.0%} of tensor cores"
        ratio = self.resident_warps * 32 * self.between_barriers / (BANDWIDTH / MULTIPROCESSORS * LATENCY)
        return f"at most {min(STREAMING, ratio):.0%} of bandwidth, {ratio:.1f} times the bytes"


def read(launch: aot.Launch) -> Facts:
    """Compile a launch and read what came of it."""
    compiled = aot.compile_for(aot.TARGETS[TARGET], launch)
    loads: Counter[int] = Counter()
    multiplications: Counter[str] = Counter()
    asked = most = floats = exponentials = 0
    flops = 0.0
    for line in compiled.asm["ptx"].splitlines():
        if "bar.sync" in line:
            asked = 0
        size = 0
        if found := _LOAD.search(line):
            size = int(found[1] or 1) * int(found[2]) // 8
        elif found := _COPY.search(line):
            size = int(found[1], 0)
        if size:
            loads[size] += 1
            asked += size
            most = max(most, asked)
        if found := _MULTIPLY.search(line):
            group = found[1] != "mma"
            m, n, k = (int(found[i]) for i in (2, 3, 4))
            multiplications[f"{'wgmma' if group else 'mma'} {m}x{n}x{k}"] += 1
            flops += 2 * m * n * k / (WARPS_OF_GROUP if group else 1)
        floats += bool(_FLOAT.search(line))
        exponentials += "ex2.approx" in line
    warps = launch.kwargs["num_warps"]
    return Facts(aot.resources(compiled), warps, loads, most, multiplications, flops, floats, exponentials)


def rows() -> list[list[str]]:
    """A row for each kernel, case and different outcome."""
    found: dict[tuple[str, ...], int] = {}
    for case in aot.CASES:
        for launch in aot.launches(case, torch.bfloat16, TARGET):
            f = read(launch)
            loads = ", ".join(f"{n} × {size}" for size, n in sorted(f.loads.items(), reverse=True))
            products = ", ".join(f"{n} × {name}" for name, n in sorted(f.multiplications.items()))
            row = (
                f"{launch.kernel.__module__.split('.')[-1]}.{launch.kernel.__name__}", f"{case[0]} {case[1]}",
                str(f.warps), str(f.resources.registers), str(f.resources.spilled), f"{f.resources.shared:,}",
                str(f.resident_warps), loads, products, f.estimate(),
            )  # fmt: skip
            found[row] = found.get(row, 0) + 1
    return [list(row) for row in sorted(found)]


HEAD = [
    "kernel", "launched for", "warps", "registers", "spilled, B", "shared, B", "resident warps", "loads × bytes",
    "tensor-core instructions", "estimate",
]  # fmt: skip


def main() -> None:
    """Write the table."""
    before, begin, rest = PAGE.read_text("utf-8").partition("<!-- facts -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert begin and end, f"{PAGE} has no place for the table"
    lines = [HEAD, ["---"] * 2 + ["---:"] * 5 + ["---"] * 3, *rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    PAGE.write_text(f"{before}{begin}Triton {triton.__version__}.\n\n{table}\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
