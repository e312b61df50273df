"""Run the suite: each question's cases in turn, with progress, one result file a question."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cogsym.bench import generate, install, machine, method, ops, report, sweep, train
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
QUICK_SECONDS = {"ops": 25.0, "train": 40.0, "sweep": 20.0, "generate": 20.0, "install": 12.0}
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
    resume: bool = False,
) -> list[Path]:
    """Measure, show and write; the result files.

    Args:
        parts: of `PARTS`.
        model: a name or a folder; None for the ones that a quick or a full run has.
        device: "cpu" or "cuda".
        full: every case with all its rounds, or what three minutes allow.
        out: the folder of the result files and pictures.
        command: written into them.
        resume: keep what result files in that folder have of the same setting, and measure the rest.

    Raises:
        CogsymError: an unknown part, model or device, a folder that cannot be written, or files of another machine or
            setting to go on with.
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
    heads: dict[str, Any] = {
        "format": report.FORMAT,
        "command": command,
        "machine": machine.describe(),
        "setting": {"models": [shape_of(name).name for name in setting.models], "device": device, "full": full},
    }
    paths = {part: out / f"{part}.json" for part in work}
    known = {part: _known(path, heads) if resume and path.exists() else [] for part, path in paths.items()}
    left = sum(len(_turns(cases, known[part])) for part, cases in work.items())
    progress = _Progress(left, None if full else sum(QUICK_SECONDS[part] for part in work))
    for part, cases in work.items():
        budget = None if full else QUICK_SECONDS[part]
        keep = partial(_keep, heads, paths[part])
        lines = measured(cases, setting.device, budget, progress.begin, known[part], keep)
        result = heads | {"cases": lines}
        report.draw(result, paths[part])
        report.show(result, progress.console)
    return list(paths.values())


def _keep(heads: dict[str, Any], path: Path, lines: list[dict[str, Any]]) -> None:
    """What there is so far, so that a run that is killed loses one case."""
    report.write(heads | {"cases": lines}, path)


def _known(path: Path, heads: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of a result file that can be gone on with."""
    result = report.read(path)
    for field in ("machine", "setting"):
        if result[field] != heads[field]:
            raise CogsymError(
                f"'{path}' cannot be gone on with: its {field} is {result[field]}, and here {heads[field]}; choose "
                "another --out, or leave --resume out to measure everything anew."
            )
    cases: list[dict[str, Any]] = result["cases"]
    return cases


def _turns(cases: list[Pending], known: list[dict[str, Any]]) -> list[int]:
    """The cases to be measured in order, by index, one for each pass that is not there yet."""
    done = {line["name"]: max(1, len(line["rounds_of_each_pass"])) for line in known}
    most = max(p.passes for p in cases)
    return [i for turn in range(most) for i, p in enumerate(cases) if done.get(p.name, 0) <= turn < p.passes]


def measured(
    cases: list[Pending],
    device: torch.device,
    budget: float | None,
    begin: Callable[[str], object],
    known: list[dict[str, Any]] | None = None,
    keep: Callable[[list[dict[str, Any]]], object] = lambda lines: None,
) -> list[dict[str, Any]]:
    """A line for each case.

    Args:
        cases: in the order of their turns.
        device: where.
        budget: seconds, of which each case has its share of what those before it left; None is as many as it takes.
        begin: told each case's name.
        known: lines from before.
        keep: given all lines so far after each pass.
    """
    passes = {line["name"]: [line] for line in known or []}
    turns = _turns(cases, known or [])
    deadline = None if budget is None else time.perf_counter() + budget
    method.keep_freed()

    def lines() -> list[dict[str, Any]]:
        return [joined(passes[pending.name]) for pending in cases if pending.name in passes]

    for done, i in enumerate(turns):
        pending = cases[i]
        begin(pending.name)
        share = None
        if deadline is not None:
            now = time.perf_counter()
            share = now + (deadline - now) / (len(turns) - done)
        least = -(-LEAST_ROUNDS // pending.passes)
        line = measure(pending.build(), device, pending.rounds, share, least)
        passes.setdefault(pending.name, []).append(line)
        keep(lines())
        _forget(device)
    return lines()


def _forget(device: torch.device) -> None:
    """Give back what the last case held: models are large, and torch.compile holds what it made of one."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    method.give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Progress:
    """A line for each case, with the time left: by the clock of a quick run, else by the cases done."""

    def __init__(self, total: int, budget: float | None) -> None:
        self.console = Console()
        self._total, self._done = total, 0
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
