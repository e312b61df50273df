"""`cogsym.ops.linear` with weights in bfloat16 beside PyTorch's products, on CPU.

    python benchmarks/linear.py

Each in float32 but for the last:

    float32     PyTorch's product with a copy of the weights in float32, at hand
    widened     the same, the copy made at each call
    bfloat16    PyTorch's product of bfloat16, its outcome in bfloat16

On a processor with a unit for bfloat16 nothing sends bfloat16 here; the figures are of interest where there is none.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.bench import ops
from cogsym.bench.case import Case, CaseSpec, Setting
from cogsym.bench.method import Variant
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.study import Study, main
from cogsym.ops import linear, linear_input_gradient
from cogsym.ops.operation import Example

ROWS = (1, 4, 16, 32, 256, 1024)


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for model in setting.models:
        for rows in ROWS if setting.full else ROWS[:2]:
            for which in ("up", "down"):
                name = f"{model}: {which}, {rows} row{'s' * (rows > 1)}"
                found.append(CaseSpec(name, partial(case, shape_of(model), which, rows, False), rounds=5))
        rows = ROWS[-1] if setting.full else ROWS[0]
        name = f"{model}: input gradient of up, {rows} row{'s' * (rows > 1)}"
        found.append(CaseSpec(name, partial(case, shape_of(model), "up", rows, True), rounds=5))
    return found


def case(shape: Shape, which: str, rows: int, gradient: bool) -> Case:
    torch.manual_seed(0)
    outputs, inputs = (2 * shape.mlp_width, shape.width) if which == "up" else (shape.width, shape.mlp_width)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).bfloat16()
    wide, x = weight.float(), torch.randn(rows, outputs if gradient else inputs)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if gradient else F.linear(x, weight)

    ours = linear_input_gradient if gradient else linear
    plain = {
        "float32": lambda x: (product(x, wide),),
        "widened": lambda x: (product(x, weight.float()),),
    }
    work = {"forward": 2.0 * rows * weight.numel()}
    example = Example({"x": x}, lambda x: (ours(x, weight),), plain["float32"], (), "FLOP", work)
    found = ops.measured_ways("linear_input_gradient" if gradient else "linear", example, "forward", plain)
    narrow = x.bfloat16()  # whose outcome is another by its rounding, and so not held against ours
    found.variants["bfloat16"] = Variant(lambda: product(narrow, weight))
    return found


STUDY = Study("linear", cases, ops.table, models=("SmolLM2-135M", "Qwen2.5-0.5B"))

if __name__ == "__main__":
    main(STUDY, __doc__)
