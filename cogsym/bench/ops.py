"""How fast is each operation? Forward and backward, on every backend here, beside PyTorch's own way.

Operations that only pass over memory are told in bytes a second beside a copy, those made of products in FLOPs a second
beside a matrix product; both are measured in the same rounds. Every gradient is taken through autograd, for ours and
for PyTorch's; frozen weights get none. Before any timing the results are compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from cogsym.bench import floor, report
from cogsym.bench.case import OURS, ROUNDING, Case, CaseSpec, Line, Setting, difference, dtype_name, error_line
from cogsym.bench.method import Variant
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.operations import OPERATIONS, Outputs, Workload, directions
from cogsym.bench.study import Study
from cogsym.ops import backend

LENGTH = 512
ROUNDS, PASSES = 7, 3
REFERENCE_BYTES = 2**30  # that an operation's reference may hold; above, it is left out


def cases(setting: Setting) -> list[CaseSpec]:
    """Every operation, direction and model."""
    dtypes = [torch.bfloat16]
    if setting.full:
        dtypes.append(torch.float16 if setting.device.type == "cuda" else torch.float32)
    found = []
    for model in setting.models:
        shape, B = shape_of(model), 4 if setting.full else 2
        for dtype in dtypes:
            for name, make in OPERATIONS.items():
                for direction in directions(make):
                    title = f"{shape.name}, {B * LENGTH} tokens, {dtype_name(dtype)}: {name}, {direction}"
                    make_workload = partial(make, shape, B, LENGTH, dtype, setting.device)
                    build = partial(case, make_workload, direction, (B * LENGTH, shape))
                    found.append(CaseSpec(title, build, rounds=ROUNDS, passes=PASSES))
    return found


def case(make: Callable[[], Workload], direction: str, product: tuple[int, Shape]) -> Case:
    """One operation in one direction, verified, in every way there is here.

    Args:
        make: makes it with its inputs.
        direction: one that it has work for.
        product: an operation of FLOPs is told beside the linear map of so many rows up an MLP of this shape.
    """
    torch.manual_seed(0)
    workload = make()
    tensor = next(iter(workload.inputs.values()))
    device, dtype = tensor.device, tensor.dtype
    truth, dout = workload.results(workload.ours)
    result = Case(unit=workload.unit, work=workload.work[direction])
    result.facts = {"backend": backend.choose(device), "dtype": dtype_name(dtype)}
    for label, (function, forced) in _candidates(workload, device).items():
        if forced == "reference" and workload.reference_bytes > REFERENCE_BYTES:
            result.skipped[label] = (
                f"the reference holds all logits, {workload.reference_bytes / 2**30:.0f} GiB of them"
            )
            continue
        context = partial(forced_backend, forced)
        try:
            with context():
                distance = difference(workload.results(function, dout)[0], truth)
                run = directed(workload, function, direction, dout)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            result.skipped[label] = error_line(error)
            continue
        if distance > ROUNDING[dtype]:
            result.different[label] = f"its results are {distance:.1e} away from ours"
            continue
        result.variants[label] = Variant(run, context)
    if workload.unit == "B":
        result.floor, result.floor_work = floor.copy(int(result.work), device), result.work
    else:
        products, (rows, shape) = floor.Products(dtype, device), product
        products.add_linear(rows, (shape.mlp_width, shape.width), input_gradient=True, weight_gradient=False)
        result.floor, result.floor_work = products, products.flops
    return result


def _candidates(workload: Workload, device: torch.device) -> dict[str, tuple[Callable[..., Outputs], str | None]]:
    """(function, backend it is forced to), by label; ours first."""
    found: dict[str, tuple[Callable[..., Outputs], str | None]] = {OURS: (workload.ours, None)}
    chosen = backend.choose(device)
    for name in ("triton", "reference") if device.type == "cuda" else ("cpp", "reference"):
        if name != chosen and not backend.unavailable(name):
            found[f"{OURS}, {name}"] = (workload.ours, name)
    return found | {label: (function, None) for label, function in workload.plain.items()}


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


def directed(
    workload: Workload, function: Callable[..., Outputs], direction: str, dout: Outputs
) -> Callable[[], object]:
    """What is timed."""
    if direction == "both":
        return lambda: workload.gradients(function(**workload.inputs), dout)
    if direction == "backward":
        outputs = function(**workload.inputs)
        return lambda: workload.gradients(outputs, dout, retain_graph=True)

    def forward() -> None:
        with torch.no_grad():
            function(**workload.inputs)

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
