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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import matplotlib
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

import cogsym
from cogsym.training.frozen import run_frozen

LAYERS, TOKENS, ROUNDS, WARM_UP = 4, 2048, 7, 2
KEEPS = ("all", "attention", "input", "nothing")
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SmolLM2-135M": (
        LlamaModel,
        LlamaConfig,
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "Qwen2.5-0.5B": (
        Qwen2Model,
        Qwen2Config,
        {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
}
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
    torch.manual_seed(0)
    model_class, config_class, shape = MODELS[name]
    model = model_class(config_class(**shape, num_hidden_layers=LAYERS, vocab_size=8, max_position_embeddings=4096))
    return model.to(dtype).requires_grad_(not frozen).train()


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
    result["floor"] = floor(blocks, dtype)
    weights = {p.untyped_storage().data_ptr() for m in (theirs, full, ours) for p in m.parameters()}
    return {"steps": result, "forwards": forwards, "weights": weights}


def floor(blocks: list[Any], dtype: torch.dtype) -> Callable[[], None]:
    """The products of forward and input gradient alone, into buffers that are there."""
    products = []
    for block in blocks:
        for projections in block.projections():
            weight = torch.cat([module.weight.detach() for module in projections.modules])
            a = torch.randn(TOKENS, weight.shape[1]).to(dtype)
            b = torch.randn(TOKENS, weight.shape[0]).to(dtype)
            products += [(a, weight.t(), torch.empty_like(b)), (b, weight, torch.empty_like(a))]

    def run() -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    return run


def held(forward: Callable[[], Tensor], weights: set[int]) -> int:
    """Bytes that the forward pass saves, storages once, parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(storages.values())


def measure(name: str, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """One case: medians, ratios, bytes."""
    it = variants(name, dtype, length)
    seconds: dict[str, list[float]] = {label: [] for label in it["steps"]}
    for i in range(WARM_UP + ROUNDS):
        for label, step in it["steps"].items():
            start = time.perf_counter()
            step()
            if i >= WARM_UP:
                seconds[label].append(time.perf_counter() - start)
    median = {label: statistics.median(values) for label, values in seconds.items()}
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "length": length,
        "rows": TOKENS // length,
        "milliseconds_a_layer": {label: 1000 * t / LAYERS for label, t in median.items()},
        "over_floor": {label: t / median["floor"] for label, t in median.items()},
        "bytes_a_token_and_layer": {
            label: held(forward, it["weights"]) / TOKENS / LAYERS for label, forward in it["forwards"].items()
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
