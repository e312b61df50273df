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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from cogsym.ops import linear_cross_entropy, logit_blocks, token_scores

# Rows, width and vocabulary of a training step with SmolLM2-135M and with Qwen2.5-0.5B.
SHAPES = {"SmolLM2-135M": (2048, 576, 49152), "Qwen2.5-0.5B": (1024, 896, 151936)}
ROUNDS = {torch.bfloat16: 7, torch.float32: 3}
RESULT = Path(__file__).parent / "results" / "linear_cross_entropy.json"
Step = Callable[[], Tensor]


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


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

    times = {step.__name__: [seconds(step) for _ in range(rounds + 1)][1:] for step in (whole, blocks)}
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
        options: min(seconds(lambda o=options: chunked(o)) for _ in range(2)) for options in chunked_options(dtype)
    }
    best = min(trials, key=trials.__getitem__)
    contestants: dict[str, Step] = {"cogsym": cogsym, "plain": plain, "torch chunked": lambda: chunked(best)}
    losses = {name: step().item() for name, step in contestants.items()}  # the warm-up
    times: dict[str, list[float]] = {name: [] for name in (*contestants, "cogsym, scores alone")}
    for _ in range(ROUNDS[dtype]):
        for name, step in contestants.items():
            times[name].append(seconds(step))
        times["cogsym, scores alone"].append(seconds(lambda: token_scores(hidden, weight, targets).loss))
    floors = floor_seconds(hidden.detach(), weight, ROUNDS[dtype])
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{name} / cogsym": [b / a for a, b in zip(times["cogsym"], times[name], strict=True)]
        for name in ("plain", "torch chunked")
    }
    return {
        "rows, width, vocabulary": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": medians,
        "seconds_of_each_round": times,
        "torch_chunked_options": str(best),
        "speed_ratio": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in ratios.items()
        },
        "floor_seconds": floors,
        "time_over_floor": {name: value / min(floors.values()) for name, value in medians.items()},
        "losses": losses,
    }


def main() -> None:
    """Measure, print, write."""
    results = []
    for (model, shape), dtype in itertools.product(SHAPES.items(), ROUNDS):
        results.append({"shape_of": model, **measure(shape, dtype)})
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
