"""`cogsym train` beside a plain transformers loop with the same layers frozen: the same losses, and how fast.

    python benchmarks/train_speed.py --model SMOLLM2_FOLDER --data TEXT_FOLDER

Both train the outer quarter of the layers from the same weights on the same packed rows in the same order, with AdamW,
in bfloat16 by autocast, frozen weights in bfloat16 and trained ones in float32. The plain loop is a bare loop around
the model's own forward, without Trainer. They take turns, A B A B; the first steps of each turn are warm-up. A few
steps of both in float32 besides show that they compute the same: in bfloat16 the losses of any two implementations part
company within three steps of a learning rate that is any use. The result is `benchmarks/results/train_speed.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

import cogsym
from cogsym.bench import machine, method
from cogsym.data import Source, pack, separator_id, tokenize
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.training.trainer import OuterTrainer, RunCallback

SEPARATOR = "<|endoftext|>"
ROUNDS, STEPS, WARM_UP, EXACT_STEPS = 3, 14, 4, 5
SETTINGS = cogsym.TrainSettings(
    length=512, batch_size=4, steps=STEPS, learning_rate=1e-3, separator=SEPARATOR, log_every=1, save_every=10**6
)
RESULT = Path(__file__).parent / "results" / "train_speed.json"


class Watch:
    """Records what `cogsym.train` feeds its model and how long each step takes."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def __enter__(self) -> Watch:
        self._training_step, self._step_end = OuterTrainer.training_step, RunCallback.on_step_end

        def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append({key: value.clone() for key, value in inputs.items()})
            return self._training_step(trainer, model, inputs, *args, **kwargs)

        def step_end(callback: Any, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - callback._step_started)
            self._step_end(callback, *args, **kwargs)

        OuterTrainer.training_step, RunCallback.on_step_end = training_step, step_end  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        OuterTrainer.training_step, RunCallback.on_step_end = self._training_step, self._step_end  # type: ignore


def ours(model: Path, source: Source, settings: cogsym.TrainSettings) -> tuple[list[float], Watch]:
    """Losses of `cogsym.train`, and what was seen of it."""
    with tempfile.TemporaryDirectory() as out, Watch() as watch:
        result = cogsym.train(model, [source], Path(out) / "run", settings=settings)
    return [line["loss"] for line in result.history], watch


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


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    source = Source(args.data / "globalvoices-en-sw" / "dev.jsonl", field="sw")
    tokenizer = load_tokenizer(args.model)
    fill = pack(tokenize(source, tokenizer, "all", separator_id(tokenizer, SEPARATOR)), SETTINGS.length, 0).fill
    method.keep_freed()
    exact = dataclasses.replace(SETTINGS, steps=EXACT_STEPS, dtype="fp32")
    our_exact, watch = ours(args.model, source, exact)
    their_exact, _ = plain(args.model, watch.batches, exact)
    times: dict[str, list[float]] = {"cogsym": [], "plain": []}
    for _ in range(ROUNDS):
        our_losses, watch = ours(args.model, source, SETTINGS)
        their_losses, seconds = plain(args.model, watch.batches, SETTINGS)
        times["cogsym"].append(statistics.median(watch.seconds[WARM_UP:]))
        times["plain"].append(statistics.median(seconds[WARM_UP:]))
        print(times, flush=True)
    tokens = SETTINGS.batch_size * SETTINGS.length
    differences = [abs(a - b) for a, b in zip(our_exact, their_exact, strict=True)]
    result = {
        "command": "python benchmarks/train_speed.py --model SMOLLM2_FOLDER --data TEXT_FOLDER",
        "machine": machine.describe(),
        "model": "SmolLM2-135M-Instruct, outer 25 % of the layers trained",
        "tokens_per_step": tokens,
        "fill": fill,
        "seconds_per_step": {name: statistics.median(values) for name, values in times.items()},
        "seconds_per_step_of_each_round": times,
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in times.items()},
        "speed_ratio": method.ratio(times["plain"], times["cogsym"]),
        "losses": {"cogsym": our_losses, "plain": their_losses},
        "float32_losses": {"cogsym": our_exact, "plain": their_exact},
        "largest_difference_of_float32_losses": max(differences),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "losses"}, indent=1))


if __name__ == "__main__":
    main()
