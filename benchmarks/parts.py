"""Where the time of frozen layers goes: products by weights, attention, and what passes over memory.

    python benchmarks/parts.py

The stack of `frozen.py`, forward and input gradient with everything kept, under Python's profiler, which times each
call of a kernel; what lies between the calls is the rest. Beside it stands the floor: the same products, with operands
that stay in cache. A layer can take no less than the floor and attention, whatever is fused with the products.
"""

from __future__ import annotations

import cProfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import cogsym
from cogsym.bench import floor, report
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting, dtype_name
from cogsym.bench.method import Variant
from cogsym.bench.models import build, shape_of
from cogsym.bench.study import Study, main
from cogsym.bench.trainers import prepared
from cogsym.models import read_block

LAYERS, TOKENS, LENGTHS = 4, 2048, (256, 512, 2048)
# Of a function's name in the profile: those of kernels, and of PyTorch's products.
PARTS = {
    "products": ("_C._nn.linear", "linear_input_gradient_reference", "_C.linear", "torch.mm", "addmm"),
    "attention": ("_C.attention",),
    "activation": ("_C.gated_activation",),
    "norms": ("_C.rms_norm",),
    "rotary": ("_C.rotary",),
}


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for model in setting.models:
        for dtype in (torch.bfloat16, torch.float32) if setting.full else (setting.dtype,):
            for length in LENGTHS if setting.full and dtype == torch.bfloat16 else (512,):
                rows, length = (TOKENS // length, length) if setting.full else setting.batch(1, 256)
                name = f"{shape_of(model).name}, {rows} x {length}, {dtype_name(dtype)}"
                found.append(CaseSpec(name, partial(case, model, dtype, rows, length, setting), rounds=9))
    return found


def case(model: str, dtype: torch.dtype, B: int, T: int, setting: Setting) -> Case:
    ours = build(model, LAYERS, dtype, setting.device).model.requires_grad_(False).train()
    x = torch.randn(B, T, ours.config.hidden_size, dtype=dtype, device=setting.device, requires_grad=True)
    dy, tables = torch.randn_like(x), ours.rotary_emb(x, torch.arange(T, device=setting.device)[None])

    def step() -> None:
        x.grad, y = None, x
        for layer in ours.layers:
            y = layer(y, position_embeddings=tables)
        y.backward(dy)

    blocks = [read_block(layer) for layer in ours.layers]
    plan = cogsym.LayerPlan.layers(LAYERS, [], embeddings=True)
    return Case(
        {OURS: Variant(partial(timed, step), partial(prepared, ours, plan, "all"), reports=True)},
        floor=floor.frozen_layers(blocks, B * T, dtype, setting.device),
        facts={"layers": LAYERS},
    )


def timed(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a step, and those of its parts."""
    profile = cProfile.Profile()
    began = time.perf_counter()
    profile.runcall(step)
    found = {"seconds": time.perf_counter() - began} | dict.fromkeys(PARTS, 0.0)
    for entry in profile.getstats():
        code = entry.code
        name = code if isinstance(code, str) else code.co_name
        for part, words in PARTS.items():
            if any(word in name for word in words):
                found[part] += entry.inlinetime
    return found | {"rest": found["seconds"] - sum(found[part] for part in PARTS)}


def cells(line: Line, ours: dict[str, Any]) -> dict[str, str]:
    layers, over = line["facts"]["layers"], line["floor"]["seconds"]
    found = {part: f"{1000 * ours[part] / layers:.2f}" for part in (*PARTS, "rest")}
    return {
        "ms a layer": f"{1000 * ours['seconds'] / layers:.1f}",
        **found,
        "floor": f"{1000 * over / layers:.2f}",
        "over the floor": f"{ours['over_floor']['median']:.2f}",
        "floor and attention": f"{1 + ours['attention'] / over:.2f}",
    }


STUDY = Study(
    "parts", cases, report.by_case(cells, "shape, rows x tokens"), pictures=(), models=("SmolLM2-135M", "Qwen2.5-0.5B")
)

if __name__ == "__main__":
    main(STUDY, __doc__)
