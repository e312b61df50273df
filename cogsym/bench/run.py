"""Run the suite: each question's cases in turn, with progress, one result file a question."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cogsym.bench import generate, install, machine, ops, report, sweep, train
from cogsym.bench.case import Pending, Setting, joined, measure
from cogsym.bench.method import LEAST_ROUNDS
from cogsym.bench.models import shape_of
from cogsym.errors import CogsymError

PARTS: dict[str, Callable[[Setting], list[Pending]]] = {
    "ops": ops.pending,
    "train": train.pending,
    "sweep": sweep.pending,
    "generate": generate.pending,
    "install": install.pending,
}
# What a quick run may take, in seconds; together less than three minutes, as a case ends with the round it is in.
QUICK_SECONDS = {"ops": 35.0, "train": 55.0, "sweep": 25.0, "generate": 25.0, "install": 20.0}
QUICK_MODELS = ("SmolLM2-135M",)
FULL_MODELS = {"cpu": ("SmolLM2-135M", "Qwen2.5-0.5B"), "cuda": ("Llama-3.2-1B", "Llama-3.1-8B")}


def run(
    parts: Iterable[str],
    *,
    model: str | None,
    device: str,
    full: bool,
    out: Path,
    command: str,
) -> list[Path]:
    """Measure, show and write; the result files.

    Args:
        parts: of `PARTS`.
        model: a name or a folder; None for the ones that a quick or a full run has.
        device: "cpu" or "cuda".
        full: every case with all its rounds, or what three minutes allow.
        out: the folder of the result files and pictures.
        command: written into them.

    Raises:
        CogsymError: an unknown part, model or device, or a folder that cannot be written.
    """
    setting = _setting(model, device, full)
    for part in parts:
        if part not in PARTS:
            raise CogsymError(f"The part is '{part}', expected one of {', '.join(PARTS)}, or compare A.json B.json.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CogsymError(f"--out is '{out}', which cannot be written: {error.strerror}; choose another.") from None
    work = {part: PARTS[part](setting) for part in parts}
    progress = _Progress(work, None if full else sum(QUICK_SECONDS[part] for part in work))
    written = []
    for part, cases in work.items():
        budget = None if full else QUICK_SECONDS[part]
        result = {
            "format": report.FORMAT,
            "command": command,
            "machine": machine.describe(),
            "setting": {"models": [shape_of(name).name for name in setting.models], "device": device, "full": full},
            "cases": measured(cases, setting.device, budget, progress.begin),
        }
        path = out / f"{part}.json"
        report.write(result, path)
        report.show(result, progress.console)
        written.append(path)
    return written


def measured(
    cases: list[Pending], device: torch.device, budget: float | None, begin: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Each case in turn, announced to `begin`; of `budget` seconds each has its share of what those before it left."""
    lines: list[list[dict[str, Any]]] = [[] for _ in cases]
    deadline = None if budget is None else time.perf_counter() + budget
    turns = [i for turn in range(max(p.passes for p in cases)) for i, p in enumerate(cases) if turn < p.passes]
    for done, i in enumerate(turns):
        pending = cases[i]
        begin(pending.name)
        share = None
        if deadline is not None:
            now = time.perf_counter()
            share = now + (deadline - now) / (len(turns) - done)
        least = -(-LEAST_ROUNDS // pending.passes)
        lines[i].append(measure(pending.build(), device, pending.rounds, share, least))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [joined(passes) for passes in lines]


class _Progress:
    """A line for each case, with the time left: by the clock of a quick run, else by the cases done."""

    def __init__(self, work: dict[str, list[Pending]], budget: float | None) -> None:
        self.console = Console()
        self._total, self._done = sum(p.passes for cases in work.values() for p in cases), 0
        self._start, self._budget = time.perf_counter(), budget

    def begin(self, name: str) -> None:
        gone = time.perf_counter() - self._start
        left = ""
        if self._budget is not None:
            left = f", {_clock(self._budget - gone)} left"
        elif self._done:
            left = f", about {_clock(gone / self._done * (self._total - self._done))} left"
        self._done += 1
        self.console.print(f"[dim]{self._done}/{self._total}  {name}{left}[/dim]", highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d}"


def _setting(model: str | None, device: str, full: bool) -> Setting:
    if device not in ("cpu", "cuda"):
        raise CogsymError(f"--device is '{device}', expected cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise CogsymError("--device is 'cuda' but torch finds no GPU here; leave it out to measure the processor.")
    models = (model,) if model else FULL_MODELS[device] if full else QUICK_MODELS
    for name in models:
        shape_of(name)
    return Setting(models, torch.device(device), full)
