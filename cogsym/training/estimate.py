"""What a run would cost: tokens, time, memory and disk, from a batch that is tried."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from cogsym.data import PackedDataset
from cogsym.decoder import layers_of
from cogsym.training.settings import TrainSettings
from cogsym.training.streamed import on_disk

_REPEATS = 2  # of a batch that is timed
_CHECKPOINTS = 3  # that are there at once: two, and one that is being written


def estimate(
    model: Any,
    rows: PackedDataset,
    held_out: dict[str, PackedDataset],
    settings: TrainSettings,
    bf16: bool,
    stored: int,
    optimizer_bytes: int,
) -> list[str]:
    """Sentences on a run.

    Args:
        model: prepared, on its device.
        rows: what it learns.
        held_out: what it is evaluated on, by name.
        settings: of the run.
        bf16: it computes under autocast.
        stored: bytes of the model as it is saved.
        optimizer_bytes: of the optimizer's state, for each trained parameter.
    """
    batches = math.ceil(len(rows) / settings.batch_size)
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))
    batch = min(settings.batch_size, len(rows))
    tokens = steps * settings.accumulation * batch * settings.length
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    inputs = [rows[i] for i in range(batch)]
    tensors = {name: torch.stack([row[name] for row in inputs]).to(device) for name in inputs[0]}

    def forward() -> torch.Tensor:
        with autocast:
            loss: torch.Tensor = model.train()(**tensors, use_cache=False).loss
        return loss

    seconds = steps * settings.accumulation * _mean_seconds(lambda: forward().backward())
    model.zero_grad()
    memory, trained = _peak_bytes(device), sum(p.numel() for p in model.parameters() if p.requires_grad)
    evaluations = 2 + (steps // settings.eval_every if settings.eval_every else 0)
    with torch.no_grad():
        evaluated = evaluations * sum(map(len, held_out.values())) / batch * (_mean_seconds(forward) if held_out else 0)
    checkpoint = trained * (4 + optimizer_bytes)
    streamed = [block for layer in layers_of(model) if (block := on_disk(layer))]
    lines = [
        f"tokens: {tokens:,} in {steps:,} steps",
        f"time: about {duration(seconds + evaluated)}, {tokens / seconds:,.0f} tokens/s"
        + (f"; evaluation {duration(evaluated)} of it" if held_out else ""),
        f"memory: about {gigabytes(memory + optimizer_bytes * trained)} at its peak",
        f"disk: {gigabytes(stored + _CHECKPOINTS * checkpoint)}, of it {gigabytes(stored)} for the model",
    ]
    if streamed:
        read = sum(block.nbytes for block in streamed)
        lines.append(
            f"streamed: {gigabytes(read)} of {len(streamed)} frozen layers stay on disk, read in each forward pass and "
            "in each backward pass"
        )
    return lines


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" and "3.5 h"."""
    if seconds < 100:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:,.1f} h"


def gigabytes(number: float) -> str:
    """Such as "0.27 GB"."""
    return f"{number / 1e9:,.2f} GB"


def _mean_seconds(work: Callable[[], object]) -> float:
    """Of a call, after a first."""
    work()
    began = time.perf_counter()
    for _ in range(_REPEATS):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / _REPEATS


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
