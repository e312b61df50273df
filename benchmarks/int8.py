"""Frozen weights in 8 bits beside bfloat16: products, a training step, and what a model learns.

    python benchmarks/int8.py --model SMOLLM2_FOLDER --data TEXT_FOLDER --work RUNS

Products are those of a layer's MLP at two shapes, x in the type that is multiplied on this processor. A turn takes
different weights one after the other, more than the caches near the processor hold, as a model's layers come one after
the other; the seconds are those of one. The step is of the whole model in MODEL, the outer quarter trained. Swahili is
learned from the same tokens (TEXT_FOLDER/globalvoices-en-sw) by the same seed with either, and what is saved, the
original frozen weights among it, is scored on text of neither (NTREX).
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cogsym
from cogsym.bench import method, report, train
from cogsym.bench.case import OURS, ROUNDING, Case, CaseSpec, Line, Setting, difference
from cogsym.bench.method import Variant
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main
from cogsym.data import Source, pack, separator_id, tokenize
from cogsym.decoder import layers_of
from cogsym.models import precision
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.ops import int8_linear, int8_linear_input_gradient, linear, linear_input_gradient
from cogsym.ops.int8_linear import dequantised, quantise
from cogsym.training.evaluate import bits_per_byte

SHAPES, ROWS = ("SmolLM2-135M", "Qwen2.5-0.5B"), (1, 4, 16, 256, 1024)
WEIGHT_BYTES = 32 * 2**20  # of those that a turn takes, in bfloat16
BFLOAT16, FLOAT32 = "bfloat16 weights", "float32 weights"
STEP = {True: (4, 256), False: (2, 16)}  # rows and length, by whether the run is full
LENGTH, BATCH, RATE = 256, 2, 1e-3
STEPS = {True: 200, False: 2}
SEPARATOR = "<|endoftext|>"


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = setting.models
    found = []
    for name in SHAPES if setting.full else (model,):
        shape = shape_of(name)
        for which in ("up", "down"):
            for rows in ROWS if setting.full else ROWS[:2]:
                build = partial(products, shape, which, rows, False)
                found.append(
                    CaseSpec(f"products, {shape.name}: {which}, {rows} row{'s' * (rows > 1)}", build, rounds=7)
                )
        rows = ROWS[-1] if setting.full else ROWS[1]
        build = partial(products, shape, "up", rows, True)
        found.append(CaseSpec(f"products, {shape.name}: input gradient of up, {rows} rows", build, rounds=7))
    rows, length = STEP[setting.full]
    found.append(
        CaseSpec(f"a step: {shape_of(model).name}, {rows} x {length} tokens", partial(step, model, setting), 7)
    )
    learned = {"before": partial(before, model, setting)}
    learned |= {name: partial(adapted, name, model, setting) for name in ("bfloat16", "int8")}
    return found + [CaseSpec(f"Swahili, {shape_of(model).name}: {name}", build) for name, build in learned.items()]


def widened() -> bool:
    """Whether products are in float32 here."""
    return precision.should_widen(torch.bfloat16, torch.device("cpu"))


def products(shape: Shape, which: str, rows: int, gradient: bool) -> Case:
    torch.manual_seed(0)
    outputs, inputs = (2 * shape.mlp_width, shape.width) if which == "up" else (shape.width, shape.mlp_width)
    number = min(32, -(-WEIGHT_BYTES // (2 * outputs * inputs)))
    weights = [(torch.randn(outputs, inputs) * inputs**-0.5).bfloat16() for _ in range(number)]
    dtype = torch.float32 if widened() else torch.bfloat16
    wide_x = torch.randn(rows, outputs if gradient else inputs)
    x = wide_x.to(dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if gradient else F.linear(x, weight)

    int8, narrow = (int8_linear_input_gradient, linear_input_gradient) if gradient else (int8_linear, linear)
    quantised = [quantise(weight) for weight in weights]
    exact = plain(x.double(), dequantised(*quantised[0], torch.float64))
    if difference([int8(x, *quantised[0])], [exact]) > ROUNDING[dtype]:
        raise AssertionError("products by int8 are others")
    result = Case(facts={"dtype": str(dtype).removeprefix("torch."), "weights": number, "rows": rows})
    unquantised = plain(x.double(), weights[0].double())
    ways = {
        OURS: [partial(int8, x, *q) for q in quantised],
        BFLOAT16: [partial(narrow, x, weight) for weight in weights],
        FLOAT32: [partial(plain, wide_x, weight.float()) for weight in weights],
    }
    for label, calls in ways.items():
        result.variants[label] = Variant(lambda calls=calls: [call() for call in calls], scale=1 / number)
        result.counts[label] = {"error": difference([calls[0]()], [unquantised])}
    return result


def step(model: str, setting: Setting) -> Case:
    rows, length = STEP[setting.full]
    result = Case(facts={"tokens": rows * length})
    for label, weights in ((OURS, "int8"), (BFLOAT16, None)):
        job = train.make_job(model, shape_of(model).layers, rows, length, False, setting.device, torch.bfloat16)
        cogsym.prepare(job.model, job.plan, keep="all", frozen_weights=weights)
        if widened():
            precision.widen(job.model)
            job.autocast = partial(torch.autocast, "cpu", enabled=False)
        optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad], 1e-6, fused=True)
        take = partial(train.take_step, optimizer, job.call())
        take()  # the optimizer's own state is there from now on
        result.variants[label] = Variant(take)
        frozen = [layer for i, layer in enumerate(layers_of(job.model)) if i not in job.plan.trained]
        result.counts[label] = {
            "weight_bytes": sum(t.nbytes for layer in frozen for t in (*layer.parameters(), *layer.buffers())),
            "peak_bytes": method.peak_bytes(take, setting.device),
        }
    return result


def before(model: str, setting: Setting) -> Case:
    return Case(facts={"bits_per_byte": score(Path(model), setting)})


def adapted(name: str, model: str, setting: Setting) -> Case:
    """The held-out score of a model whose outer quarter has learned, and the losses on the way."""
    folder = setting.work / name
    shutil.rmtree(folder, ignore_errors=True)
    run = cogsym.train(
        model,
        [Source(setting.data / "globalvoices-en-sw" / "train.jsonl", field="sw")],
        folder,
        settings=cogsym.TrainSettings(
            length=LENGTH if setting.full else 32,
            batch_size=BATCH,
            steps=STEPS[setting.full],
            learning_rate=RATE,
            separator=separator(Path(model)),
            frozen_weights="int8" if name == "int8" else None,
            save_every=10**6,
        ),
    )
    losses = [line["loss"] for line in run.history if "loss" in line]
    facts = {"bits_per_byte": score(run.folder, setting), "losses": losses, "seconds": run.seconds}
    return Case(facts=facts | {"tokens": run.steps * BATCH * LENGTH, "trained_parameters": run.trained_parameters})


def separator(model: Path) -> str | None:
    """SmolLM2's, whose bos is the marker of a chat; of another tokenizer its own."""
    return SEPARATOR if SEPARATOR in load_tokenizer(model).get_vocab() else None


def score(folder: Path, setting: Setting) -> float:
    """Bits per byte of NTREX in Swahili."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    between = separator_id(tokenizer, separator(folder))
    text = tokenize(Source(setting.data / "ntrex-128" / "swa.jsonl"), tokenizer, "all", between)
    return bits_per_byte(model, pack(text, LENGTH, None), batch_size=BATCH)


def table(lines: list[Line]) -> Table:
    """Of one group of cases."""
    name = lines[0]["name"]
    if name.startswith("products"):
        return report.by_case(product_cells, "product")(lines)
    if name.startswith("a step"):
        return report.by_variant(step_cells, lambda label: "int8 weights" if label == OURS else label)(lines)
    scores = {line["name"].rpartition(": ")[2]: line["facts"]["bits_per_byte"] for line in lines}
    plain = scores.get("bfloat16")
    rows = [
        [name, f"{score:.4f}", f"{score / plain - 1:+.2%}" if plain and name == "int8" else ""]
        for name, score in scores.items()
    ]
    return ["frozen weights", "bits per byte", "beside bfloat16"], rows


def product_cells(line: Line, ours: dict[str, Any]) -> dict[str, str]:
    return {"int8, ms": f"{ours['seconds'] * 1e3:.3g}", "error": f"{ours['error']:.2%}"}


def step_cells(line: Line, result: dict[str, Any]) -> dict[str, str]:
    return {
        "ms a step": f"{result['seconds'] * 1e3:,.0f}",
        "time / cogsym": report.spread(result.get("over_cogsym")),
        "frozen layers, MB": f"{result['weight_bytes'] / 1e6:,.0f}",
        "peak, MB": f"{result['peak_bytes'] / 1e6:,.0f}",
    }


STUDY = Study("int8", cases, table, pictures=(), needs=("model", "data", "work"))

if __name__ == "__main__":
    main(STUDY, __doc__)
