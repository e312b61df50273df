"""The loss of a frozen head, forward and backward to the hidden states, beside PyTorch's two ways and its products.

    python benchmarks/linear_cross_entropy.py

PyTorch does as a transformers model does it, with logits, their float32 copy and `cross_entropy`; and by its own
`linear_cross_entropy` in chunks, with the options that are fastest of those tried. Scores alone are what a sweep asks
for. The floor is the products hidden·weightᵀ and, with a gradient, dlogits·weight into memory that is there, whole or
in the blocks that cogsym uses, whichever is faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from cogsym.bench import floor, method, ops
from cogsym.bench.case import Case, CaseSpec, Setting, dtype_name
from cogsym.bench.method import Variant
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.study import Study, main
from cogsym.ops import logit_blocks, token_scores

TOKENS = {"SmolLM2-135M": 2048, "Qwen2.5-0.5B": 1024}  # of a training step
QUICK_TOKENS = 128
ROUNDS = {torch.bfloat16: 7, torch.float32: 3}


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for model in setting.models:
        shape, tokens = shape_of(model), TOKENS.get(model, QUICK_TOKENS) if setting.full else QUICK_TOKENS
        for dtype, rounds in ROUNDS.items():
            name = f"{shape.name}, {dtype_name(dtype)}: {tokens} tokens"
            found.append(CaseSpec(name, partial(case, shape, tokens, dtype, setting.device), rounds=rounds))
    return found


def chunked_options(dtype: torch.dtype) -> list[LinearCrossEntropyOptions]:
    """What PyTorch's own operation is tried with; its policies differ where sums are more precise than the inputs."""
    policies = ("balanced",) if dtype == torch.float32 else ("balanced", "accurate")
    tried = itertools.product(policies, (128, 256, 512))
    own_choice = [] if dtype == torch.float32 else [LinearCrossEntropyOptions()]  # 2.7 times the others in float32
    return own_choice + [
        LinearCrossEntropyOptions(acc_policy=policy, batch_chunk_size=chunk, chunking_method=None)
        for policy, chunk in tried
    ]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, options: LinearCrossEntropyOptions) -> tuple[Tensor]:
    return (F.linear_cross_entropy(hidden, weight, targets, options=options),)


def scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_scores(hidden, weight, targets).loss


def case(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    example = ops.examples()["linear_cross_entropy"](shape.sizes(1, tokens), dtype, device)
    hidden, weight, targets = example.inputs.values()
    tried = {
        options: ops.directed(example, partial(chunked, options=options), "both", (torch.ones(()),))
        for options in chunked_options(dtype)
    }
    options, *_ = method.fastest(tried)
    plain = {ops.PLAIN: example.plain, "PyTorch, chunked": partial(chunked, options=options)}
    result = ops.measured_ways("linear_cross_entropy", example, "both", plain)
    result.variants["cogsym, scores alone"] = Variant(partial(scores, hidden.detach(), weight, targets))
    floors = {"whole": whole_floor(hidden.detach(), weight), "blocks": blocks_floor(hidden.detach(), weight)}
    fastest, *_ = method.fastest(floors)
    result.floor, result.floor_work = floors[fastest], result.work
    result.facts |= {"chunked_options": str(options), "floor": fastest, "blocks": logit_blocks.BLOCKS["cpu"]}
    return result


def whole_floor(hidden: Tensor, weight: Tensor) -> floor.Products:
    products = floor.Products(hidden.dtype, hidden.device)
    products.add_linear(len(hidden), tuple(weight.shape), input_gradient=True, weight_gradient=False)
    return products


def blocks_floor(hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    columns = logit_blocks.BLOCKS["cpu"][1]
    pieces = list(logit_blocks.row_pieces(len(hidden), hidden.device, hidden.shape[1]))
    most = max(end - begin for begin, end in pieces) * min(columns, len(weight))
    logits, dhidden = hidden.new_zeros(most), torch.zeros_like(hidden)

    def blocks() -> None:
        for (begin, end), first in itertools.product(pieces, range(0, len(weight), columns)):
            w = weight[first : first + columns]
            block = logits[: (end - begin) * len(w)].view(end - begin, len(w))
            torch.mm(hidden[begin:end], w.t(), out=block)
            torch.mm(block, w, out=dhidden[begin:end])

    return blocks


STUDY = Study("linear_cross_entropy", cases, ops.table, models=tuple(TOKENS))

if __name__ == "__main__":
    main(STUDY, __doc__)
