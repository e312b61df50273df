"""The longest sequence and the largest model that fit in a memory, computed from counted bytes.

    python benchmarks/longest.py

One row of tokens goes through a model whose outer quarter is trained as `cogsym train` does it: frozen weights and the
computation in bfloat16, trained weights in float32 with AdamW. Beside ours stand transformers' own layers with the same
parameters frozen, and the same with every layer under non-reentrant checkpointing; what a trained layer keeps is then
saved too, so ours is also shown with its trained layers checkpointed.

Saved-tensor hooks count what a short forward pass of four layers of the real width holds, at two lengths, on a CPU:
bytes a token and bytes once, of each trained layer, each frozen layer and the rest, the loss included. From these, the
model's depth and its parameters follow the bytes at the end of the forward pass and at each layer of the backward pass,
where a layer that is computed again holds what it had not kept. The largest of them, with weights, gradients and the
optimizer's state, must fit. Not counted: what operations need while they run, the allocator's waste and the GPU's own.

Results: `benchmarks/results/longest.json`; a model that is there from the same versions is not counted again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import cogsym
from cogsym.bench import machine

METHODS = (
    "cogsym all", "cogsym attention", "cogsym input", "cogsym nothing", "cogsym nothing, trained checkpointed",
    "transformers, frozen", "transformers, all checkpointed",
)  # fmt: skip
PARTS = ("first trained", "first frozen", "frozen", "trained")  # the layers that are counted
LENGTHS = (16, 48)
GB = 10**9
LONGEST = ((8, "Llama-3.2-1B"), (24, "Llama-3.2-3B"), (80, "Llama-3.1-8B"))
MEMORIES, TOKENS = (8, 24, 80), 4096
# A trained parameter in float32 with its gradient and AdamW's two moments; a frozen one in bfloat16.
TRAINED_BYTES, FROZEN_BYTES = 16, 2
# hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
}
RESULTS = Path(__file__).parent / "results"


def build(name: str, layers: int) -> Any:
    """A model of this shape on the meta device."""
    D, F, _, heads, groups, vocabulary, tied = SHAPES[name]
    config_class, model_class = (
        (LlamaConfig, LlamaForCausalLM) if name.startswith("Llama") else (Qwen2Config, Qwen2ForCausalLM)
    )
    config = config_class(
        hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return model_class(config)


def parameters(name: str) -> tuple[int, int]:
    """(all, trained) of the whole model."""
    layer, *others = (p.num_parameters for p in cogsym.LayerPlan.last(1, 1).parts(build(name, 1))[1:])
    layers, embeddings = SHAPES[name][2], SHAPES[name][0] * SHAPES[name][5]
    return layers * layer + embeddings + sum(others), len(cogsym.LayerPlan.outer(layers).trained) * layer


def count(name: str) -> dict[str, dict[str, tuple[float, float]]]:
    """For each method and part, (bytes a token, bytes once)."""
    model = build(name, 4)
    plan = cogsym.LayerPlan.outer(4)
    for part in plan.parts(model):
        for p in part.parameters:
            p.requires_grad_(part.trained)
            p.data = p.data.to(torch.float32 if part.trained else torch.bfloat16)
    model.to_empty(device="cpu").train()
    model.tie_weights()
    for t in (*model.parameters(), *model.buffers()):
        t.data.zero_()
    results = {}
    for method in METHODS:
        if method.startswith("cogsym"):
            cogsym.prepare(model, plan, keep=method.split()[1].rstrip(","))
        checkpointed = [i for i, part in enumerate(PARTS) if "all" in method or "trained" in part]
        a, b = (held(model, length, checkpointed if "checkpointed" in method else []) for length in LENGTHS)
        slope = {part: (b[part] - a[part]) / (LENGTHS[1] - LENGTHS[0]) for part in a}
        results[method] = {part: (slope[part], a[part] - slope[part] * LENGTHS[0]) for part in a}
        if method.startswith("cogsym"):
            cogsym.restore(model)
            for part in plan.parts(model):
                for p in part.parameters:
                    p.requires_grad_(part.trained)
    return results


def held(model: Any, length: int, checkpointed: list[int]) -> dict[str, int]:
    """Bytes that each part of the forward pass is the first to save, storages once, parameters left out."""
    part, seen, saved = "rest", {p.untyped_storage().data_ptr() for p in model.parameters()}, defaultdict(int)

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(storage)
            saved[part] += storage.nbytes()

    def enter(name: str, *_: Any) -> None:
        nonlocal part
        part = name

    layers, alive = model.model.layers, []  # a storage that is freed could come back as another with its address
    hooks = [layer.register_forward_pre_hook(partial(enter, p)) for layer, p in zip(layers, PARTS, strict=True)]
    hooks.append(model.model.norm.register_forward_pre_hook(partial(enter, "rest")))
    own = [layer.forward for layer in layers]
    for i in checkpointed:
        layers[i].forward = partial(checkpoint, own[i], use_reentrant=False)
    ids = torch.zeros(1, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing), torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for i in checkpointed:
        layers[i].forward = own[i]
    return {name: saved[name] for name in ("rest", *PARTS)}


def moments(name: str, method: str, counts: Any, numbers: tuple[int, int]) -> list[tuple[float, float]]:
    """(bytes a token, bytes once) of the end of the forward pass and of each layer's turn in the backward pass."""
    own, total, trained = counts[method], *numbers
    plan = cogsym.LayerPlan.outer(SHAPES[name][2])
    n = plan.num_layers - len(plan.trained)
    whole = counts["cogsym all" if method.startswith("cogsym") else "transformers, frozen"]
    state = total * FROZEN_BYTES + trained * (TRAINED_BYTES - FROZEN_BYTES)
    here, result, met = [0.0, float(state)], [], set()
    for i in range(plan.num_layers):
        part = "trained" if i in plan.trained else "frozen"
        if part not in met:
            met.add(part)
            part = f"first {part}"
        here = [here[j] + own[part][j] for j in (0, 1)]
        again = [max(whole[part][j] - own[part][j], 0) for j in (0, 1)]
        if method.startswith("cogsym nothing") and i not in plan.trained:
            again[0] += 2 * math.isqrt(n - 1) * counts["cogsym input"]["frozen"][0]
        result.append((here[0] + again[0], here[1] + again[1]))
    return [*result, (here[0] + own["rest"][0], here[1] + own["rest"][1])]


def longest(memory: int, when: list[tuple[float, float]]) -> int:
    """Tokens of one row that fit in `memory` bytes at each of these moments."""
    return max(0, min(int((memory - once) // token) for token, once in when))


def main() -> None:
    """Count, compute, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = RESULTS / "longest.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"machine": None, "counted": {}}
    counted = dict(before["counted"]) if before["machine"] == machine.describe() else {}
    for name in SHAPES:
        start = time.perf_counter()
        if name not in counted:
            counted[name] = {"parameters": parameters(name), "bytes": count(name)}
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        whens = {
            name: {m: moments(name, m, it["bytes"], it["parameters"]) for m in METHODS} for name, it in counted.items()
        }
        result = {
            "command": "python benchmarks/longest.py",
            "machine": machine.describe(),
            "counted": counted,
            "longest": [
                {"memory_gb": gb, "model": model, "tokens": {m: longest(gb * GB, whens[model][m]) for m in METHODS}}
                for gb, model in LONGEST
                if model in counted
            ],
            "largest": [
                {
                    "memory_gb": gb,
                    "tokens": TOKENS,
                    "model": {
                        m: max(
                            (model for model in counted if longest(gb * GB, whens[model][m]) >= TOKENS),
                            key=lambda model: counted[model]["parameters"][0],
                            default=None,
                        )
                        for m in METHODS
                    },
                }
                for gb in MEMORIES
            ],
        }
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
