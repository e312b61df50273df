"""A stack of frozen layers, forward and input gradient: time and bytes held, for every `keep` and every alternative.

    python benchmarks/frozen.py

The stack has the shape of SmolLM2-135M or Qwen2.5-0.5B and random weights; a gradient comes in at its end and is wanted
at its beginning, as in CogSym training. Beside ours: transformers' own layers with frozen weights and PyTorch's SDPA,
the same under non-reentrant checkpointing, the same under `torch.compile` with a static shape, and full fine-tuning
(all weights' gradients, no optimizer). The floor is the matrix products that no method avoids, alone. All variants take
turns in one process, several rounds after a warm-up; medians. Results: `benchmarks/results/frozen.json` and `.png`; a
case that is there from the same machine and versions is not measured again: delete it, or the file, to do so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cogsym
from cogsym.bench import floor, machine, method
from cogsym.bench.models import build
from cogsym.training.autograd import run_frozen

LAYERS, TOKENS, ROUNDS = 4, 2048, 7
CPU = torch.device("cpu")
KEEPS = ("all", "attention", "input", "nothing")
CASES = [
    ("SmolLM2-135M", torch.bfloat16, 256),
    ("SmolLM2-135M", torch.bfloat16, 512),
    ("SmolLM2-135M", torch.bfloat16, 1024),
    ("SmolLM2-135M", torch.bfloat16, 2048),
    ("SmolLM2-135M", torch.float32, 512),
    ("Qwen2.5-0.5B", torch.bfloat16, 512),
    ("Qwen2.5-0.5B", torch.bfloat16, 2048),
    ("Qwen2.5-0.5B", torch.float32, 512),
]
RESULTS = Path(__file__).parent / "results"


def stack(name: str, dtype: torch.dtype, frozen: bool) -> Any:
    """A model of LAYERS layers."""
    return build(name, LAYERS, dtype, CPU).model.requires_grad_(not frozen).train()


def variants(name: str, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """What takes turns, each forward and backward once; the forward passes alone; and where the weights lie."""
    B = TOKENS // length
    theirs, full, ours = (stack(name, dtype, frozen) for frozen in (True, False, True))
    cogsym.prepare(ours, cogsym.LayerPlan.layers(LAYERS, [], embeddings=True), keep="all")
    x = torch.randn(B, length, theirs.config.hidden_size, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    tables = theirs.rotary_emb(x, torch.arange(length)[None])
    blocks = [vars(layer)["_cogsym"].block for layer in ours.layers]
    where = blocks[0].positions(tables, None, x, training=True)

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

    def kept(keep: Any) -> Tensor:
        y = x
        for block in blocks:
            y = run_frozen(block, y, where, keep)
        return y

    compiled = torch.compile(plain, dynamic=False)
    forwards: dict[str, Callable[[], Tensor]] = {f"cogsym {k}": lambda k=k: kept(k) for k in KEEPS}
    forwards |= {
        "transformers, frozen": lambda: plain(theirs.layers),
        "checkpointing": checkpointed,
        "torch.compile": lambda: compiled(theirs.layers),
        "full fine-tuning": lambda: plain(full.layers),
    }

    def step(forward: Callable[[], Tensor]) -> None:
        x.grad = None
        forward().backward(dy)
        for p in full.parameters():
            p.grad = None

    result: dict[str, Any] = {label: (lambda f=f: step(f)) for label, f in forwards.items()}
    result["floor"] = floor.frozen_layers(blocks, TOKENS, dtype, CPU)
    weights = [p for m in (theirs, full, ours) for p in m.parameters()]
    return {"steps": result, "forwards": forwards, "weights": weights}


def measure(name: str, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """One case: medians, ratios, bytes."""
    it = variants(name, dtype, length)
    steps = {label: method.Variant(step) for label, step in it["steps"].items()}
    method.first_calls(steps, CPU)
    seconds = method.interleaved(steps, CPU, rounds=ROUNDS)
    median = {label: statistics.median(values) for label, values in seconds.items()}
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "length": length,
        "rows": TOKENS // length,
        "milliseconds_a_layer": {label: 1000 * t / LAYERS for label, t in median.items()},
        "over_floor": {label: t / median["floor"] for label, t in median.items()},
        "bytes_a_token_and_layer": {
            label: method.saved_bytes(forward, it["weights"]) / TOKENS / LAYERS
            for label, forward in it["forwards"].items()
        },
    }


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Time against bytes held, one panel a case of length 512 in bfloat16."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [c for c in cases if c["length"] == 512 and c["dtype"] == "bfloat16"]
    figure, axes = plt.subplots(1, len(shown), figsize=(6.4 * len(shown), 4.4), squeeze=False)
    for axis, case in zip(axes[0], shown, strict=True):
        most = max(case["bytes_a_token_and_layer"].values())
        for ours in (False, True):
            labels = [k for k in case["bytes_a_token_and_layer"] if k.startswith("cogsym") is ours]
            xs = [case["bytes_a_token_and_layer"][k] / 1000 for k in labels]
            ys = [case["milliseconds_a_layer"][k] for k in labels]
            axis.plot(xs, ys, "o-" if ours else "s", color="tab:blue" if ours else "tab:gray", markersize=6)
            for x, y, label in zip(xs, ys, labels, strict=True):
                text, right = label.removeprefix("cogsym "), x > 0.6 * most / 1000
                axis.annotate(
                    text, (x, y), xytext=(-7 if right else 5, -3 if right else 5), textcoords="offset points",
                    ha="right" if right else "left", fontsize=8,
                )  # fmt: skip
        axis.axhline(case["milliseconds_a_layer"]["floor"], color="tab:red", linewidth=1)
        axis.annotate("the products alone", (0, case["milliseconds_a_layer"]["floor"]), xytext=(2, 3),
                      textcoords="offset points", fontsize=8, color="tab:red")  # fmt: skip
        axis.set(xlabel="kB held a token and layer", ylabel="ms a layer, forward and input gradient")
        axis.set(title=f"{case['model']}'s shape, {case['rows']} x {case['length']} tokens", ylim=(0, None))
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure every case, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    method.keep_freed()
    path, cases = RESULTS / "frozen.json", []
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"machine": None, "cases": []}
    done = {
        (c["model"], c["dtype"], c["length"]): c for c in before["cases"] if before["machine"] == machine.describe()
    }
    for name, dtype, length in CASES:
        known = done.get((name, str(dtype).removeprefix("torch."), length))
        cases.append(known or measure(name, dtype, length))
        print(json.dumps(cases[-1]), flush=True)
        torch.compiler.reset()
        result = {"command": "python benchmarks/frozen.py", "machine": machine.describe(), "layers": LAYERS}
        path.write_text(json.dumps(result | {"cases": cases}, indent=1) + "\n", "utf-8")
    plot(cases, RESULTS / "frozen.png")


if __name__ == "__main__":
    main()
