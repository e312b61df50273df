"""What a run says of settings that are taken and may not do what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cogsym.plan import LayerPlan
from cogsym.training.prepare import record_of
from cogsym.training.settings import TrainSettings
from cogsym.training.sharded import whole

# The best of four by a dev set where SmolLM2-135M learned Swahili from 204,800 tokens (benchmarks/swahili.py).
_RATES = {"LoRA": 8e-3, "the outer quarter": 2e-3, "all layers": 8e-4}
_RISEN = 1.1  # so many times the first loss is no chance of a batch
_GROWN = 100.0  # no model's weights are so many times as large as those of another


def notices(model: Any, settings: TrainSettings, plan: LayerPlan) -> Iterator[str]:
    """Sentences on a prepared model that is about to be trained."""
    memory, size = record_of(model).memory, 2 if settings.dtype == "bf16" else 4
    first = 0 if plan.embeddings else min(plan.trained, default=plan.num_layers)
    held = memory.least(first, settings.batch_size, settings.length, size)
    if settings.memory_budget is not None and held > settings.memory_budget:
        yield (
            f"Warning: the memory budget (--memory) is {settings.memory_budget / 2**20:,.1f} MiB and frozen layers "
            f"hold {held / 2**20:,.1f} MiB of a batch even where they keep nothing, which will be used."
        )
    if settings.learning_rate == TrainSettings().learning_rate:
        rates = ", ".join(f"{rate:g} for {what}" for what, rate in _RATES.items())
        yield (
            f"learning rate (--learning-rate) {settings.learning_rate:g}, careful for any model; on a model of 135 M "
            f"the best of four were {rates}: try some, with held-out text (--eval 5%)"
        )


def risen(first: float, history: Sequence[Mapping[str, float]], rate: float) -> str | None:
    """A sentence where a run ends with a higher loss than it began with, or None."""
    last = next((line["loss"] for line in reversed(history) if "loss" in line), None)
    if not first or last is None or last <= _RISEN * first:
        return None
    return _useless(f"the loss rose from {first:.4g} to {last:.4g}", rate)


@torch.no_grad()
def largest_weight(model: Any) -> float:
    """Of the trained parameters' root mean squares the largest; every rank must ask."""
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    return max((float(whole(p.float().square().mean())) ** 0.5 for p in trained), default=0.0)


def grown(before: float, after: float, rate: float) -> str | None:
    """A sentence where the last step, whose loss nobody sees, has made the weights useless, or None."""
    if after <= _GROWN * max(before, 1.0):
        return None
    return _useless(f"the trained weights grew from at most {before:.3g} to {after:.3g} (root mean square)", rate)


def _useless(what: str, rate: float) -> str:
    return (
        f"Warning: {what}, so the model has learned nothing of use; start again with a lower learning rate "
        f"(--learning-rate) than {rate:g}."
    )


@torch.no_grad()
def tells_documents_apart(model: Any) -> bool:
    """Whether a document is the same to a model behind another one, where positions count from 0 anew."""
    ids = torch.arange(6, device=model.device)[None]
    training = model.training
    model.eval()
    packed = model(input_ids=ids, position_ids=ids % 3, use_cache=False).logits[:, 3:]
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits
    model.train(training)
    return bool((packed - alone).norm() < 0.1 * alone.norm())
