"""`cogsym.ops.attention` beside PyTorch's scaled_dot_product_attention on CPU, forward and backward.

    python benchmarks/attention.py

PyTorch runs its flash kernel, once with grouped heads as they are (`enable_gqa`) and once with keys and values
repeated; the faster of the two is the competitor, for each shape and direction. All read the same slices of a fused
projection and take turns, A B C A B C, after a warm-up. The result is `benchmarks/results/attention.json`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cogsym.bench import machine, method
from cogsym.bench.models import SHAPES
from cogsym.ops import AttentionOptions, attention

SMALL = ("SmolLM2-135M", "Qwen2.5-0.5B")
CASES = [
    *((name, B, T, torch.bfloat16) for name in SMALL for B, T in ((4, 256), (4, 512), (2, 1024), (1, 2048))),
    *(("Llama-3.1-8B", 1, T, torch.bfloat16) for T in (512, 2048)),
    *((name, B, T, torch.float32) for name in SMALL for B, T in ((4, 512), (1, 2048))),
    ("Llama-3.1-8B", 1, 512, torch.float32),
]
ROUNDS, SECONDS = 5, 0.06
CPU = torch.device("cpu")
RESULT = Path(__file__).parent / "results" / "attention.json"


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, AttentionOptions(q.shape[-1] ** -0.5))[0]


def enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


FUNCTIONS = (ours, enable_gqa, repeated)


def measure(B: int, T: int, H: int, KV: int, D: int, dtype: torch.dtype) -> dict[str, object]:
    """Milliseconds of each function, GFLOP/s of ours, and the ratio to the better of PyTorch's."""
    fused = torch.randn(B, T, H + 2 * KV, D).to(dtype)
    inputs = [t.detach().requires_grad_() for t in fused.split((H, KV, KV), 2)]
    dout = torch.randn(B, T, H, D).to(dtype)
    outputs = {f: f(*inputs) for f in FUNCTIONS}

    def forward(f: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            f(*inputs)

    def backward(f: Callable[..., Tensor]) -> None:
        torch.autograd.grad(outputs[f], inputs, dout, retain_graph=True)

    products = 2 * B * H * T * (T + 1) / 2 * D  # of one product, the masked half left out
    result: dict[str, object] = {}
    for direction, count in ((forward, 2), (backward, 5)):
        variants = {f.__name__: method.Variant(partial(direction, f)) for f in FUNCTIONS}
        method.first_calls(variants, CPU)
        rounds = method.interleaved(variants, CPU, rounds=ROUNDS, seconds=SECONDS)
        best = min(FUNCTIONS[1:], key=lambda f: statistics.median(rounds[f.__name__])).__name__
        result[direction.__name__] = {
            "milliseconds": {name: statistics.median(times) * 1e3 for name, times in rounds.items()},
            "gflops_per_second": count * products / statistics.median(rounds["ours"]) / 1e9,
            "competitor": best,
            "speed_ratio": method.ratio(rounds[best], rounds["ours"]),
        }
    return result


def main() -> None:
    """Measure, compare, write."""
    cases = []
    for name, B, T, dtype in CASES:
        shape = SHAPES[name]
        H, KV, D = shape.heads, shape.kv_heads, shape.head_dim
        case = {"shape": name, "B": B, "T": T, "H": H, "KV": KV, "D": D, "dtype": str(dtype).removeprefix("torch.")}
        cases.append({**case, **measure(B, T, H, KV, D, dtype)})
        ratios = [f"{d} {cases[-1][d]['speed_ratio']['median']:.2f}" for d in ("forward", "backward")]  # type: ignore
        print(*case.values(), *ratios, flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    result = {"command": "python benchmarks/attention.py", "machine": machine.describe(), "cases": cases}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
