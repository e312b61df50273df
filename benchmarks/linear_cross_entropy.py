"""The loss of a frozen head, forward and backward to the hidden states, beside PyTorch's two ways and its products.

    python benchmarks/linear_cross_entropy.py

The contestants take turns, A B A B, after a warm-up:

- cogsym: `cogsym.ops.linear_cross_entropy`;
- plain: as a transformers model does it, logits, their float32 copy, `torch.nn.functional.cross_entropy`;
- torch chunked: `torch.nn.functional.linear_cross_entropy` with the options that the script finds fastest.

The floor is the two products hidden·weightᵀ and dlogits·weight into memory that is there, whole or in the blocks that
cogsym uses, whichever is faster. The result is `benchmarks/results/linear_cross_entropy.json`.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from cogsym.bench import machine, method
from cogsym.bench.models import SHAPES
from cogsym.ops import linear_cross_entropy, logit_blocks, token_scores

ROWS = {"SmolLM2-135M": 2048, "Qwen2.5-0.5B": 1024}  # of a training step
ROUNDS = {torch.bfloat16: 7, torch.float32: 3}
RESULT = Path(__file__).parent / "results" / "linear_cross_entropy.json"
CPU = torch.device("cpu")
Step = Callable[[], Tensor]


def rounds_of(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one that warms up."""
    variants = {name: method.Variant(step) for name, step in steps.items()}
    method.first_calls(variants, CPU)
    return method.interleaved(variants, CPU, rounds=rounds, seconds=0)


def chunked_options(dtype: torch.dtype) -> list[LinearCrossEntropyOptions]:
    """What PyTorch's own operation is tried with; its policies differ where sums are more precise than the inputs."""
    policies = ("balanced",) if dtype == torch.float32 else ("balanced", "accurate")
    tried = itertools.product(policies, (128, 256, 512))
    own_choice = [] if dtype == torch.float32 else [LinearCrossEntropyOptions()]  # 2.7 times the others in float32
    return own_choice + [
        LinearCrossEntropyOptions(acc_policy=policy, batch_chunk_size=chunk, chunking_method=None)
        for policy, chunk in tried
    ]


def floor_seconds(hidden: Tensor, weight: Tensor, rounds: int) -> dict[str, float]:
    """The products alone."""
    (N, D), V = hidden.shape, len(weight)
    logits, dhidden = hidden.new_zeros(N, V), hidden.new_zeros(N, D)

    def whole() -> Tensor:
        torch.mm(hidden, weight.t(), out=logits)
        return torch.mm(logits, weight, out=dhidden)

    columns = logit_blocks.BLOCKS["cpu"][1]
    pieces = list(logit_blocks.row_pieces(N, hidden.device))

    def blocks() -> Tensor:
        for (begin, end), first in itertools.product(pieces, range(0, V, columns)):
            w = weight[first : first + columns]
            block = logits.view(-1)[: (end - begin) * len(w)].view(end - begin, len(w))
            torch.mm(hidden[begin:end], w.t(), out=block)
            torch.mm(block, w, out=dhidden[begin:end])
        return dhidden

    times = rounds_of({step.__name__: step for step in (whole, blocks)}, rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """One shape and dtype."""
    N, D, V = shape
    torch.manual_seed(0)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype)
    targets = torch.randint(V, (N,))

    def backward(loss: Tensor) -> Tensor:
        hidden.grad = None
        loss.backward()
        return loss.detach()

    def cogsym() -> Tensor:
        return backward(linear_cross_entropy(hidden, weight, targets))

    def plain() -> Tensor:
        return backward(F.cross_entropy(F.linear(hidden, weight).float(), targets))

    def chunked(options: LinearCrossEntropyOptions) -> Tensor:
        return backward(F.linear_cross_entropy(hidden, weight, targets, options=options))

    trials = {
        options: min(method.sample(lambda o=options: chunked(o), CPU, 0) for _ in range(2))
        for options in chunked_options(dtype)
    }
    best = min(trials, key=trials.__getitem__)
    contestants: dict[str, Step] = {"cogsym": cogsym, "plain": plain, "torch chunked": lambda: chunked(best)}
    losses = {name: step().item() for name, step in contestants.items()}
    contestants["cogsym, scores alone"] = lambda: token_scores(hidden, weight, targets).loss
    times = rounds_of(contestants, ROUNDS[dtype])
    floors = floor_seconds(hidden.detach(), weight, ROUNDS[dtype])
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows, width, vocabulary": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": medians,
        "seconds_of_each_round": times,
        "torch_chunked_options": str(best),
        "speed_ratio": {
            f"{name} / cogsym": method.ratio(times[name], times["cogsym"]) for name in ("plain", "torch chunked")
        },
        "floor_seconds": floors,
        "time_over_floor": {name: value / min(floors.values()) for name, value in medians.items()},
        "losses": losses,
    }


def main() -> None:
    """Measure, print, write."""
    results = []
    for (model, rows), dtype in itertools.product(ROWS.items(), ROUNDS):
        shape = SHAPES[model]
        results.append({"shape_of": model, **measure((rows, shape.width, shape.vocabulary), dtype)})
        shown = ("shape_of", "dtype", "seconds", "floor_seconds", "speed_ratio", "torch_chunked_options", "losses")
        print(json.dumps({key: results[-1][key] for key in shown}, indent=1), flush=True)
    result = {
        "command": "python benchmarks/linear_cross_entropy.py",
        "machine": machine.describe(),
        "blocks": dict(logit_blocks.BLOCKS),
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
