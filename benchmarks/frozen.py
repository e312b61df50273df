"""A stack of frozen layers, forward and input gradient: time and bytes held, for every `keep` and every alternative.

    python benchmarks/frozen.py

The stack has the shape of SmolLM2-135M or Qwen2.5-0.5B and random weights; a gradient comes in at its end and is wanted
at its beginning, as in CogSym training. Beside ours: transformers' own layers with frozen weights and PyTorch's SDPA,
the same under non-reentrant checkpointing, the same under `torch.compile` with a static shape, and full fine-tuning
(all weights' gradients, no optimizer). The floor is the matrix products that no method avoids, alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cogsym
from cogsym.bench import floor, method, plots, report
from cogsym.bench.case import OURS, ROUNDING, Case, CaseSpec, Line, Setting, difference, dtype_name
from cogsym.bench.models import build, shape_of
from cogsym.bench.study import Study, main
from cogsym.bench.trainers import prepared
from cogsym.models import read_block

LAYERS, TOKENS = 4, 2048
KEEPS = {OURS: "all"} | {f"{OURS}, keeps {keep}": keep for keep in ("attention", "input", "nothing")}
ALTERNATIVES = ("transformers, frozen", "checkpointing", "torch.compile", "full fine-tuning")
LENGTHS = {
    "SmolLM2-135M": ((torch.bfloat16, 256), (torch.bfloat16, 512), (torch.bfloat16, 1024), (torch.bfloat16, 2048),
                     (torch.float32, 512)),
    "Qwen2.5-0.5B": ((torch.bfloat16, 512), (torch.bfloat16, 2048), (torch.float32, 512)),
}  # fmt: skip


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for model in setting.models:
        sizes = LENGTHS.get(model, ()) if setting.full else ((torch.bfloat16, 256),)
        tokens = TOKENS if setting.full else 256
        for dtype, length in sizes:
            name = f"{shape_of(model).name}, {tokens // length} x {length}, {dtype_name(dtype)}"
            build_case = partial(case, model, dtype, tokens // length, length, setting)
            found.append(CaseSpec(name, build_case, rounds=7))
    return found


def case(model: str, dtype: torch.dtype, B: int, T: int, setting: Setting) -> Case:
    """All that take turns, each forward and backward once."""
    theirs, full, ours = (
        build(model, LAYERS, dtype, setting.device).model.requires_grad_(trained).train()
        for trained in (False, True, False)
    )
    x = torch.randn(B, T, theirs.config.hidden_size, dtype=dtype, device=setting.device, requires_grad=True)
    dy = torch.randn_like(x)
    tables = theirs.rotary_emb(x, torch.arange(T, device=setting.device)[None])

    def plain(layers: Any) -> Tensor:
        y = x
        for layer in layers:
            y = layer(y, position_embeddings=tables)
        return y

    def checkpointed() -> Tensor:
        y = x
        for layer in theirs.layers:
            y = checkpoint(layer, y, position_embeddings=tables, use_reentrant=False)
        return y

    def step(forward: Callable[[], Tensor]) -> Tensor:
        x.grad = None
        y = forward()
        y.backward(dy)
        for p in full.parameters():
            p.grad = None
        return y.detach()

    compiled = torch.compile(plain, dynamic=False)
    plan = cogsym.LayerPlan.layers(LAYERS, [], embeddings=True)
    contexts = {label: partial(prepared, ours, plan, keep) for label, keep in KEEPS.items()}
    forwards = dict.fromkeys(KEEPS, partial(plain, ours.layers)) | {
        "transformers, frozen": partial(plain, theirs.layers),
        "checkpointing": checkpointed,
        "torch.compile": partial(compiled, theirs.layers),
        "full fine-tuning": partial(plain, full.layers),
    }
    weights = [p for m in (theirs, full, ours) for p in m.parameters()]
    blocks = [read_block(layer) for layer in ours.layers]
    result = Case(floor=floor.frozen_layers(blocks, B * T, dtype, setting.device), facts={"layers": LAYERS})
    truth: list[Tensor] = []
    for label, forward in forwards.items():
        context = contexts.get(label, nullcontext)
        with context():
            values = [step(forward), x.grad]
            truth = truth or values
            if (distance := difference(values, truth)) > ROUNDING[dtype]:
                result.different[label] = f"its output and gradient are {distance:.1e} away from ours"
                continue
            result.counts[label] = {"kept_bytes_a_token": method.saved_bytes(forward, weights) / B / T}
        result.variants[label] = method.Variant(partial(step, forward), context)
    return result


def cells(line: Line, ours: dict[str, Any]) -> dict[str, str]:
    return {
        "cogsym, ms a layer": f"{1000 * ours['seconds'] / line['facts']['layers']:.1f}",
        "over the floor": f"{ours['over_floor']['median']:.2f}",
    }


def draw(lines: list[Line], path: Path) -> None:
    """Of the cases of 512 tokens a row in bfloat16, or of all where there are none."""
    shown = [line for line in lines if line["name"].endswith("x 512, bfloat16")]
    plots.draw_time_and_bytes(shown or lines, path)


STUDY = Study(
    "frozen", cases, report.by_case(cells, "shape, rows x tokens", ALTERNATIVES), (draw,), models=tuple(LENGTHS)
)

if __name__ == "__main__":
    main(STUDY, __doc__)
