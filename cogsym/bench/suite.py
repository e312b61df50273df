"""The studies of `cogsym bench`, and what a quick and a full run of them are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from cogsym.bench import generate, install, ops, overhead, study, sweep, train
from cogsym.bench.case import Setting
from cogsym.bench.models import shape_of
from cogsym.errors import CogsymError

STUDIES = {s.name: s for s in (m.STUDY for m in (ops, overhead, train, sweep, generate, install))}
# What a quick run may take, in seconds; together less than three minutes, as a case ends with the round it is in.
QUICK_SECONDS = {"ops": 25.0, "overhead": 10.0, "train": 40.0, "sweep": 20.0, "generate": 20.0, "install": 12.0}
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
    models = (model,) if model else FULL_MODELS[device] if full else QUICK_MODELS
    for name in models:
        shape_of(name)  # raises
    work = []
    for part in parts:
        if part not in STUDIES:
            raise CogsymError(f"The part is '{part}', expected one of {', '.join(STUDIES)}, or compare A.json B.json.")
        seconds = None if full else QUICK_SECONDS[part]
        work.append((STUDIES[part], Setting(models, torch.device(device), full, seconds)))
    return study.run(work, out, command, resume=resume, only=only)
