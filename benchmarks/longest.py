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

A second table has the largest model for a laptop and for a GPU, by what is trained and by how frozen weights are held:
in bfloat16, in 8 bits (`--frozen int8`), or on disk (`--stream`) with two layers' in memory at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cogsym
from cogsym.bench.case import Case, CaseSpec, Line, Setting
from cogsym.bench.models import SHAPES, build
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main
from cogsym.bench.train import LORA_RANK
from cogsym.bench.trainers import prepared
from cogsym.decoder import decoder_of
from cogsym.models import read_block

METHODS = (
    "cogsym all", "cogsym attention", "cogsym input", "cogsym nothing", "cogsym nothing, trained checkpointed",
    "transformers, frozen", "transformers, all checkpointed",
)  # fmt: skip
ADAPTED = "cogsym nothing, LoRA"  # which the first table does not have
PARTS = ("first trained", "first frozen", "frozen", "trained")  # the layers that are counted
LENGTHS = (16, 48)
GB = 10**9
LONGEST = ((8, "Llama-3.2-1B"), (24, "Llama-3.2-3B"), (80, "Llama-3.1-8B"))
MEMORIES, TOKENS = (8, 24, 80), 4096
# A trained parameter in float32 with its gradient and AdamW's two moments; a frozen one in bfloat16.
TRAINED_BYTES, FROZEN_BYTES = 16, 2
HELD = ("bfloat16", "int8", "on disk")
ROW = 2048  # tokens of the row in the second table
# What of a device's memory is there for a run, in GB: on the one the system, Python and PyTorch take the rest.
DEVICES = {"laptop of 16 GB": 12, "GPU of 24 GB": 23}
META = torch.device("meta")

Counts = dict[str, dict[str, tuple[float, float]]]  # for each method and part, (bytes a token, bytes once)


def cases(setting: Setting) -> list[CaseSpec]:
    return [CaseSpec(name, partial(case, name)) for name in setting.models]


def case(name: str) -> Case:
    return Case(facts={"parameters": parameters(name), "adapters": adapter_parameters(name), "bytes": count(name)})


def parameters(name: str) -> tuple[int, int]:
    """(all, trained) of the whole model."""
    model = build(name, 1, torch.bfloat16, META)
    layer, *others = (p.num_parameters for p in cogsym.LayerPlan.last(1, 1).parts(model)[1:])
    layers, embeddings = SHAPES[name].layers, SHAPES[name].width * SHAPES[name].vocabulary
    return layers * layer + embeddings + sum(others), len(cogsym.LayerPlan.outer(layers).trained) * layer


def adapter_parameters(name: str) -> int:
    """Of the adapters of one layer."""
    shape = SHAPES[name]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return LORA_RANK * (7 * shape.width + 2 * queries + 2 * keys + 3 * shape.mlp_width)


def count(name: str) -> Counts:
    model = build(name, 4, torch.bfloat16, META)
    plan = cogsym.LayerPlan.outer(4)
    for part in plan.parts(model):
        for p in part.parameters:
            p.requires_grad_(part.trained)
            p.data = p.data.to(torch.float32 if part.trained else torch.bfloat16)
    model.to_empty(device="cpu").train()
    model.tie_weights()
    for t in (*model.parameters(), *model.buffers()):
        t.data.zero_()
    results = {method: count_method(model, method) for method in METHODS}
    for p in model.parameters():
        p.data = p.data.bfloat16()
    names = [name for projections in read_block(model.model.layers[0]).projections() for name in projections.names]
    config = LoraConfig(r=LORA_RANK, target_modules=names, layers_to_transform=list(plan.trained))
    return results | {ADAPTED: count_method(get_peft_model(model, config), ADAPTED)}


def count_method(model: Any, method: str) -> dict[str, tuple[float, float]]:
    checkpointed = [i for i, part in enumerate(PARTS) if "all" in method or "trained" in part]
    count_held = partial(held, model, checkpointed=checkpointed if "checkpointed" in method else [])
    keep = method.split()[1].rstrip(",") if method.startswith("cogsym") else None
    with prepared(model, cogsym.LayerPlan.outer(4), keep) if keep else nullcontext():
        a, b = map(count_held, LENGTHS)
    slope = {part: (b[part] - a[part]) / (LENGTHS[1] - LENGTHS[0]) for part in a}
    return {part: (slope[part], a[part] - slope[part] * LENGTHS[0]) for part in a}


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

    decoder = decoder_of(model)
    layers, alive = decoder.layers, []  # a storage that is freed could come back as another with its address
    hooks = [layer.register_forward_pre_hook(partial(enter, p)) for layer, p in zip(layers, PARTS, strict=True)]
    hooks.append(decoder.norm.register_forward_pre_hook(partial(enter, "rest")))
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


def weight_bytes(line: Line, plan: cogsym.LayerPlan, adapters: bool = False, frozen: str = "bfloat16") -> int:
    """Of all weights in memory, and of gradients and the optimizer's state.

    Args:
        line: the model's.
        plan: which layers are trained.
        adapters: LoRA is, in these layers.
        frozen: how the weights of the others are held, of `HELD`.
    """
    shape, (total, trained) = SHAPES[line["name"]], line["facts"]["parameters"]
    layer = trained // len(cogsym.LayerPlan.outer(shape.layers).trained)
    learned = line["facts"]["adapters"] if adapters else layer
    here = FROZEN_BYTES * (total - shape.layers * layer) + TRAINED_BYTES * learned * len(plan.trained)
    here += FROZEN_BYTES * layer * len(plan.trained) * adapters
    n, of_layer = shape.layers - len(plan.trained), FROZEN_BYTES * layer
    if frozen == "int8":
        # A byte a weight, and the scales of the rows in float32.
        outputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 2 * shape.mlp_width + 2 * shape.width
        of_layer += 4 * outputs - (FROZEN_BYTES - 1) * shape.layer_weights
    return here + of_layer * (min(n, 2) if frozen == "on disk" else n)


def moments(
    line: Line, method: str, plan: cogsym.LayerPlan | None = None, frozen: str = "bfloat16"
) -> list[tuple[float, float]]:
    """(bytes a token, bytes once) of the end of the forward pass and of each layer's turn in the backward pass."""
    counts, shape = line["facts"]["bytes"], SHAPES[line["name"]]
    own, plan = counts[method], plan or cogsym.LayerPlan.outer(shape.layers)
    n = plan.num_layers - len(plan.trained)
    whole = counts["cogsym all" if method.startswith("cogsym") else "transformers, frozen"]
    if method == ADAPTED:  # whose trained layers compute nothing again
        whole = own | {part: whole[part] for part in ("first frozen", "frozen")}
    here = [0.0, float(weight_bytes(line, plan, method == ADAPTED, frozen))]
    result, met = [], set()
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


def longest(line: Line, method: str, gigabytes: int, *asked: Any) -> int:
    """Tokens of one row that fit at each of these moments; `asked` is as in `moments`."""
    return max(0, min(int((gigabytes * GB - once) // token) for token, once in moments(line, method, *asked)))


def fits(lines: list[Line]) -> Table:
    """The largest model that each device adapts, with rows of `ROW` tokens, frozen layers keeping nothing."""
    by_size = sorted(lines, key=lambda line: -line["facts"]["parameters"][0])
    trained = {
        "the outer quarter": (cogsym.LayerPlan.outer, "cogsym nothing"),
        "the first and the last layer": (partial(cogsym.LayerPlan.outer, front=1, back=1), "cogsym nothing"),
        "LoRA on the outer quarter": (cogsym.LayerPlan.outer, ADAPTED),
    }
    rows = []
    for what, (make, method) in trained.items():
        for frozen in HELD:
            cells = []
            for gigabytes in DEVICES.values():
                plans = {line["name"]: make(SHAPES[line["name"]].layers) for line in by_size}
                largest = next(
                    (line for line in by_size if longest(line, method, gigabytes, plans[line["name"]], frozen) >= ROW),
                    None,
                )
                cells.append("none" if largest is None else fitting(largest, method, plans[largest["name"]], frozen))
            rows.append([what if frozen == HELD[0] else "", frozen, *cells])
    return ["trained", "frozen layers", *DEVICES], rows


def fitting(line: Line, method: str, plan: cogsym.LayerPlan, frozen: str) -> str:
    """A model that fits, what it takes, and what it reads."""
    taken = max(token * ROW + once for token, once in moments(line, method, plan, frozen))
    _, trained = line["facts"]["parameters"]
    layer = trained // len(cogsym.LayerPlan.outer(plan.num_layers).trained)
    read = 2 * FROZEN_BYTES * layer * (plan.num_layers - len(plan.trained))
    return f"{line['name']}, {taken / GB:.1f} GB" + f", reads {read / GB:.0f} GB a step" * (frozen == "on disk")


def table(lines: list[Line]) -> Table:
    """Tokens of some models that fit in some memories, and the largest model that does with so many tokens."""
    known = {line["name"]: line for line in lines}
    asked = [(gigabytes, model) for gigabytes, model in LONGEST if model in known]
    head = [
        "", *(f"tokens in {gigabytes} GB, {model}" for gigabytes, model in asked),
        *(f"model in {gigabytes} GB, {TOKENS:,} tokens" for gigabytes in MEMORIES),
    ]  # fmt: skip
    rows = []
    by_size = sorted(lines, key=lambda line: -line["facts"]["parameters"][0])
    for method in METHODS:
        largest = [
            next((line["name"] for line in by_size if longest(line, method, gigabytes) >= TOKENS), "none")
            for gigabytes in MEMORIES
        ]
        rows.append([method, *(f"{longest(known[model], method, gb):,}" for gb, model in asked), *largest])
    return head, rows


MODELS = sorted(
    (name for name in SHAPES if name.startswith(("Llama", "Qwen"))),
    key=lambda name: SHAPES[name].width * SHAPES[name].layers,
)
STUDY = Study("longest", cases, table, pictures=(), models=tuple(MODELS))

if __name__ == "__main__":
    main(STUDY, __doc__)
