"""`cogsym train` beside a plain transformers loop with the same layers frozen: the same losses, and how fast.

    python benchmarks/train_speed.py --model SMOLLM2_FOLDER --data TEXT_FOLDER

Both train the outer quarter of the layers from the same weights on the same packed rows in the same order, with AdamW,
in bfloat16 by autocast, frozen weights in bfloat16 and trained ones in float32. The plain loop is a bare loop around
the model's own forward, without Trainer. A turn is a whole run, and reports the median of its steps, the first ones
left out. A few steps of both in float32 besides show that they compute the same: in bfloat16 the losses of any two
implementations part company within three steps of a learning rate that is any use.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

import cogsym
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.method import Variant
from cogsym.bench.models import shape_of
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main
from cogsym.data import Source, pack, separator_id, tokenize
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.training.trainer import OuterTrainer, RunCallback

PLAIN = "transformers, plain loop"
ROUNDS, STEPS, QUICK_STEPS, WARM_UP, EXACT_STEPS = 3, 14, 6, 4, 5
SETTINGS = cogsym.TrainSettings(
    length=512, batch_size=4, steps=STEPS, learning_rate=1e-3, separator="<|endoftext|>", log_every=1, save_every=10**6
)


def cases(setting: Setting) -> list[CaseSpec]:
    settings, rounds = SETTINGS, ROUNDS
    if not setting.full:
        settings, rounds = dataclasses.replace(SETTINGS, length=64, steps=QUICK_STEPS, separator=None), 1
    source = Source(setting.data / "globalvoices-en-sw" / "dev.jsonl", field="sw")
    return [
        CaseSpec(f"{shape_of(model).name}, outer quarter", partial(case, Path(model), source, settings), rounds)
        for model in setting.models
    ]


def case(model: Path, source: Source, settings: cogsym.TrainSettings) -> Case:
    tokenizer = load_tokenizer(model)
    text = tokenize(source, tokenizer, "all", separator_id(tokenizer, settings.separator))
    result = Case(facts={"tokens": settings.batch_size * settings.length, "fill": pack(text, settings.length, 0).fill})
    batches: list[dict[str, Any]] = []  # those of our last turn, which the plain loop's turn follows

    def exact_or_timed(settings: cogsym.TrainSettings, losses: str, ours: bool) -> dict[str, float]:
        found, seconds = train(model, source, settings, batches) if ours else plain(model, batches, settings)
        result.facts.setdefault(losses, {})[OURS if ours else PLAIN] = found
        return {"seconds": statistics.median(seconds[WARM_UP:])}

    exact = dataclasses.replace(settings, steps=EXACT_STEPS, dtype="fp32")
    for label, ours in ((OURS, True), (PLAIN, False)):
        exact_or_timed(exact, "float32_losses", ours)
        run = partial(exact_or_timed, settings, "losses", ours)
        result.variants[label] = Variant(run, warm_up=False, reports=True)
    apart = [abs(a - b) for a, b in zip(*result.facts["float32_losses"].values(), strict=True)]
    result.facts["largest_difference_of_float32_losses"] = max(apart)
    return result


def train(
    model: Path, source: Source, settings: cogsym.TrainSettings, batches: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Losses and seconds of the steps of `cogsym.train`; `batches` become what it feeds its model."""
    seconds: list[float] = []
    batches.clear()

    def training_step(trainer: Any, network: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batches.append({key: value.clone() for key, value in inputs.items()})
        return compute(trainer, network, inputs, *args, **kwargs)

    def on_step_end(callback: Any, *args: Any, **kwargs: Any) -> None:
        seconds.append(time.perf_counter() - callback._step_started)
        end(callback, *args, **kwargs)

    compute, end = OuterTrainer.training_step, RunCallback.on_step_end
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.object(OuterTrainer, "training_step", training_step),
        mock.patch.object(RunCallback, "on_step_end", on_step_end),
    ):
        result = cogsym.train(model, [source], Path(out) / "run", settings=settings)
    return [line["loss"] for line in result.history], seconds


def plain(
    folder: Path, batches: list[dict[str, Any]], settings: cogsym.TrainSettings
) -> tuple[list[float], list[float]]:
    """Losses and seconds of a bare loop on the same batches."""
    half = settings.dtype == "bf16"
    model = load_model(folder, torch.bfloat16 if half else torch.float32)
    trained = cogsym.LayerPlan.outer(model.config.num_hidden_layers).trained
    for p in model.parameters():
        p.requires_grad_(False)
    for i in trained:
        for p in model.model.layers[i].parameters():
            p.requires_grad_(True)
            p.data = p.data.float()
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm]))
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and n in decayed]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.0, fused=True)
    warm_up = int(-(-len(batches) * settings.warmup // 1))
    scheduler = get_scheduler(settings.schedule, optimizer, warm_up, len(batches))
    model.train()
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def table(lines: list[Line]) -> Table:
    names = {PLAIN: "plain transformers loop, middle frozen", OURS: "`cogsym train`"}
    rows = []
    for line in lines:
        seconds = {label: line["variants"][label]["seconds"] for label in names}
        tokens = line["facts"]["tokens"]
        rows += [[name, f"{seconds[label]:.2f}", f"{tokens / seconds[label]:,.0f}"] for label, name in names.items()]
    return ["", "seconds a step", "tokens a second"], rows


STUDY = Study("train_speed", cases, table, needs=("model", "data"))

if __name__ == "__main__":
    main(STUDY, __doc__)
