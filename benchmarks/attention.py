"""`cogsym.ops.attention` beside PyTorch's scaled_dot_product_attention on CPU, forward and backward.

    python benchmarks/attention.py

PyTorch runs its flash kernel, once with grouped heads as they are and once with keys and values repeated. All read the
same slices of a fused projection.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cogsym.bench import ops
from cogsym.bench.case import CaseSpec, Setting, dtype_name
from cogsym.bench.models import shape_of
from cogsym.bench.study import Study, main

SMALL = {
    torch.bfloat16: ((4, 256), (4, 512), (2, 1024), (1, 2048)),
    torch.float32: ((4, 512), (1, 2048)),
}
LARGE = {torch.bfloat16: ((1, 512), (1, 2048)), torch.float32: ((1, 512),)}  # of Llama-3.1-8B


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for model in setting.models:
        shape = shape_of(model)
        for dtype, sizes in (SMALL if shape.width < 2048 else LARGE).items():
            for B, T in sizes if setting.full else sizes[:1]:
                for direction in ("forward", "backward"):
                    name = f"{shape.name}, {dtype_name(dtype)}: {B} x {T} tokens, {direction}"
                    build = partial(
                        ops.case, "attention", shape, shape.sizes(B, T), dtype, direction, setting.device, MORE
                    )
                    found.append(CaseSpec(name, build, rounds=5))
    return found


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)


MORE = {"PyTorch, keys repeated": repeated}
STUDY = Study("attention", cases, ops.table, models=("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.1-8B"))

if __name__ == "__main__":
    main(STUDY, __doc__)
