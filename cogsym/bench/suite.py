"""The studies of `cogsym bench`, and what a quick and a full run of them are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cogsym.bench import generate, install, ops, overhead, report, speed, study, sweep, train
from cogsym.bench.case import Setting, dtype_name
from cogsym.bench.models import shape_of
from cogsym.bench.speed import Speed
from cogsym.errors import CogsymError

STUDIES = {s.name: s for s in (m.STUDY for m in (ops, overhead, train, sweep, generate, install))}
# What a quick run takes, in seconds; together less than three minutes, with what starts it and ends it.
QUICK_SECONDS = {"ops": 30.0, "overhead": 10.0, "train": 40.0, "sweep": 30.0, "generate": 25.0, "install": 15.0}
QUICK_MODELS = ("SmolLM2-135M",)
FULL_MODELS = {"cpu": ("SmolLM2-135M", "Qwen2.5-0.5B"), "cuda": ("Llama-3.2-1B", "Llama-3.1-8B")}
SCALES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # that the work of a quick run's cases may have


def run(
    parts: Iterable[str],
    *,
    model: str | None,
    device: str,
    full: bool,
    out: Path,
    command: str,
    resume: bool = False,
    only: str = "",
) -> list[Path]:
    """Measure, show and write; the result files.

    Args:
        parts: of `STUDIES`.
        model: a name or a folder; None for the ones that a quick or a full run has.
        device: "cpu" or "cuda".
        full: every case with all its rounds, or what three minutes allow.
        out, command, resume, only: as in `study.run`.

    Raises:
        CogsymError: an unknown part, model or device, or what `study.run` raises.
    """
    if device not in FULL_MODELS:
        raise CogsymError(f"--device is '{device}', expected cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise CogsymError("--device is 'cuda' but torch finds no GPU here; leave it out to measure the processor.")
    parts = list(parts)
    for part in parts:
        if part not in STUDIES:
            raise CogsymError(f"The part is '{part}', expected one of {', '.join(STUDIES)}, or compare A.json B.json.")
    models = (model,) if model else FULL_MODELS[device] if full else QUICK_MODELS
    for name in models:
        shape_of(name)  # raises
    here = speed.measured(torch.device(device))
    work = []
    for part in parts:
        if full:
            setting = Setting(models, torch.device(device), True, here.dtype)
        else:
            begun = report.read(path)["setting"] if resume and (path := out / f"{part}.json").exists() else {}
            setting = quick_setting(part, models, torch.device(device), here, begun)
        work.append((STUDIES[part], setting))
    smaller = [f"{s.scale:g} of a quick run's work in {one.name}" for one, s in work if s.scale < 1]
    with_less = f", with {' and '.join(smaller)}" if smaller else ""
    Console().print(f"{here} Measured in {dtype_name(here.dtype)}{with_less}.", highlight=False)
    return study.run(work, out, command, resume=resume, only=only)


def quick_setting(
    part: str, models: tuple[str, ...], device: torch.device, here: Speed, begun: dict[str, Any] | None = None
) -> Setting:
    """A part's quick run on this machine: the most work of `SCALES` that it has time for.

    Args:
        part: of `STUDIES`.
        models: names or folders.
        device: where it runs.
        here: how fast that is.
        begun: the setting of a run that is gone on with, as its result file has it, whose scale stays.
    """
    seconds = QUICK_SECONDS[part]
    for scale in [begun["scale"]] if begun and "scale" in begun else SCALES:
        setting = Setting(models, device, False, here.dtype, scale, here.rate, seconds)
        if sum(spec.seconds * spec.passes for spec in STUDIES[part].cases(setting)) <= seconds:
            break
    return setting
