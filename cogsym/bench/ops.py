"""How fast is each operation? Forward and backward, on every backend here, beside PyTorch's own way.

Operations that only pass over memory are told in bytes a second beside a copy, those made of products in FLOPs a second
beside a matrix product; both are measured in the same rounds. Every gradient is taken through autograd, for ours and
for PyTorch's; frozen weights get none. Before any timing the results are compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cogsym.bench import floor, report
from cogsym.bench.case import (
    OURS,
    QUICK_ROUNDS,
    ROUNDING,
    Case,
    CaseSpec,
    Line,
    Setting,
    difference,
    dtype_name,
    error_line,
)
from cogsym.bench.method import Variant
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.study import Study
from cogsym.ops import backend, operations, route
from cogsym.ops.operation import Example, MakeExample, Sizes

PLAIN = "PyTorch"
LENGTH = 512
ROUNDS, PASSES = 7, 3
CALLS = 60  # times the floor's seconds that all variants of a case together take with the least rounds, about
REFERENCE_BYTES = 2**30  # of logits that the reference of attention may hold; above, it is left out

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]  # of the inputs of an example, by name


def examples() -> dict[str, MakeExample]:
    """Of every operation that declares one, by name."""
    return {name: operation.example for name, operation in operations().items() if operation.example}


def cases(setting: Setting) -> list[CaseSpec]:
    """Every operation, direction and model."""
    dtypes = [setting.dtype]
    if setting.full and setting.dtype != torch.float32:
        dtypes.append(torch.float16 if setting.device.type == "cuda" else torch.float32)
    rows, length = (4, LENGTH) if setting.full else setting.batch(2, LENGTH)
    rounds, passes = (ROUNDS, PASSES) if setting.full else (QUICK_ROUNDS, PASSES if setting.scale == 1 else 1)
    found = []
    for model in setting.models:
        shape = shape_of(model)
        sizes = shape.sizes(rows, length)
        for dtype in dtypes:
            for name, make in examples().items():
                counted = make(sizes, dtype, torch.device("meta"))
                for direction, work in counted.work.items():
                    title = f"{shape.name}, {rows * length} tokens, {dtype_name(dtype)}: {name}, {direction}"
                    build = partial(case, name, shape, sizes, dtype, direction, setting.device)
                    seconds = CALLS / passes * work / setting.rate if counted.unit == "FLOP" else 0.0
                    found.append(CaseSpec(title, build, rounds=rounds, passes=passes, seconds=seconds))
    return found


def case(
    name: str,
    shape: Shape,
    sizes: Sizes,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    more: Mapping[str, Function] | None = None,
) -> Case:
    """An operation's example in one direction, verified, in every way there is here, and `more` ways of PyTorch's."""
    torch.manual_seed(0)
    example = examples()[name](sizes, dtype, device)
    logits = 4 * sizes.rows * sizes.heads * sizes.length**2 if name == "attention" else 0
    result = measured_ways(name, example, direction, {PLAIN: example.plain} | dict(more or {}), logits)
    if example.unit == "FLOP":
        products, tokens = floor.Products(dtype, device), sizes.rows * sizes.length
        products.add_linear(tokens, (shape.mlp_width, shape.width), input_gradient=True, weight_gradient=False)
        result.floor, result.floor_work = products, products.flops
    return result


def measured_ways(name: str, example: Example, direction: str, plain: Mapping[str, Function], logits: int = 0) -> Case:
    """An example in one direction, verified.

    Args:
        name: of the operation.
        example: it at work.
        direction: one that it has work for.
        plain: PyTorch's ways, by label.
        logits: bytes of them that our reference holds.

    Returns:
        With a copy as its floor where the operation passes over memory.
    """
    tensor = next(iter(example.inputs.values()))
    device, dtype = tensor.device, tensor.dtype
    served = route(name, device, dtype).backend
    result = Case(unit=example.unit, work=example.work[direction])
    result.facts = {"backend": served, "dtype": dtype_name(dtype)}
    ways: dict[str, tuple[Function, str | None]] = {OURS: (example.ours, None)}
    for other in ("triton", "reference") if device.type == "cuda" else ("cpp", "reference"):
        if other != served and not backend.unavailable(other):
            ways[f"{OURS}, {other}"] = (example.ours, other)
    truth, dout = results(example, example.ours)
    for label, (function, forced) in (ways | {label: (function, None) for label, function in plain.items()}).items():
        if forced == "reference" and logits > REFERENCE_BYTES:
            result.skipped[label] = f"the reference holds all logits, {logits / 2**30:.0f} GiB of them"
            continue
        context = partial(forced_backend, forced)
        try:
            with context():
                distance = difference(results(example, function, dout)[0], truth)
                run = directed(example, function, direction, dout)
        except Exception as error:  # Triton's are of kinds of their own
            result.skipped[label] = error_line(error)
            continue
        if distance > ROUNDING[dtype]:
            result.different[label] = f"its results are {distance:.1e} away from ours"
            continue
        result.variants[label] = Variant(run, context)
    if example.unit == "B":
        result.floor, result.floor_work = floor.copy(int(result.work), device), result.work
    return result


def gradients(example: Example, outputs: Outputs, dout: Outputs, retain_graph: bool = False) -> tuple[Tensor, ...]:
    """Those of the differentiated inputs."""
    if not example.differentiated:
        return ()
    wanted = [example.inputs[name] for name in example.differentiated]
    return torch.autograd.grad(outputs, wanted, dout, retain_graph=retain_graph)


def results(example: Example, function: Function, dout: Outputs | None = None) -> tuple[list[Tensor], Outputs]:
    """Outputs and gradients, and the gradients of the outputs that they were taken for."""
    outputs = function(**example.inputs)
    if dout is None:
        dout = tuple(torch.ones_like(o) if o.dim() == 0 else torch.randn_like(o) for o in outputs)
    return [*(o.detach() for o in outputs), *gradients(example, outputs, dout)], dout


@contextlib.contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """COGSYM_BACKEND, for a while; None leaves it as it is."""
    before = os.environ.get("COGSYM_BACKEND")
    if name is not None:
        os.environ["COGSYM_BACKEND"] = name
    try:
        yield
    finally:
        if name is not None:
            del os.environ["COGSYM_BACKEND"]
            if before is not None:
                os.environ["COGSYM_BACKEND"] = before


def directed(example: Example, function: Function, direction: str, dout: Outputs) -> Callable[[], object]:
    """What is timed."""
    if direction == "both":
        return lambda: gradients(example, function(**example.inputs), dout)
    if direction == "backward":
        outputs = function(**example.inputs)
        return lambda: gradients(example, outputs, dout, retain_graph=True)

    def forward() -> None:
        with torch.no_grad():
            function(**example.inputs)

    return forward


def cells(line: Line, ours: dict[str, Any]) -> dict[str, str]:
    """Ours in a table."""
    unit, scale = {"B": ("GB/s", 1e9), "FLOP": ("TFLOP/s", 1e12)}[line["unit"]]
    over_floor = ours.get("over_floor")
    return {
        "cogsym, ms": f"{ours['seconds'] * 1e3:.3g}",
        "rate": f"{ours['rate'] / scale:.3g} {unit}",
        "of the floor's": f"{1 / over_floor['median']:.0%}" if over_floor else "",
    }


table = report.by_case(cells, "operation")
STUDY = Study("ops", cases, table)
