"""One thing that is measured: variants that compute the same, a floor, and what is counted exactly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cogsym.bench import method
from cogsym.bench.method import Variant

OURS = "cogsym"
# Norm of the difference over the norm of the truth that two ways of computing the same may have, at most: some ten
# roundings in a row for an operation. A step passes through every layer, and its gradients through it twice.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Setting:
    """What a run of the suite is asked for.

    Attributes:
        models: names or folders.
        device: where it runs.
        full: every case, or what fits in three minutes.
    """

    models: tuple[str, ...]
    device: torch.device
    full: bool


@dataclass
class Case:
    """What is measured together.

    Attributes:
        part: the question it belongs to: "ops", "train", "install".
        name: unique in its part.
        variants: those that take turns; ours is called "cogsym", and starts with it where there are several.
        floor: what no method can do without, or None.
        work: of one call, and `floor_work` of one call of the floor; in `unit`.
        unit: "B" or "FLOP", of which rates are told; None where only time is.
        facts: counted numbers and settings, by name.
        counts: exact numbers of each variant, by label: bytes kept, peak bytes.
        skipped: why others were not measured, by label.
        different: others that compute something else, by label, and how far off they are.
    """

    part: str
    name: str
    variants: dict[str, Variant]
    floor: Callable[[], object] | None = None
    work: float = 1.0
    floor_work: float = 1.0
    unit: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """A case that is made when its turn comes: models are large.

    Attributes:
        name: what is shown meanwhile.
        build: makes it.
        rounds: at most.
    """

    name: str
    build: Callable[[], Case]
    rounds: int = 15


def measure(case: Case, device: torch.device, rounds: int, deadline: float | None = None) -> dict[str, Any]:
    """Everything a result file says of a case.

    Args:
        case: its variants are run.
        device: where.
        rounds: at most.
        deadline: of `time.perf_counter`, after which no round begins.
    """
    variants = dict(case.variants)
    if case.floor is not None:
        variants["floor"] = Variant(case.floor)
    start = time.perf_counter()
    first = method.first_calls(variants, device)
    if deadline is not None:
        left = max(deadline - time.perf_counter(), 0.0)
        for label, once in first.items():
            if label not in (OURS, "floor") and 2 * method.LEAST_ROUNDS * once > left:
                case.skipped[label] = "a call takes too long for the time there is"
                del variants[label]
    times = method.interleaved(variants, device, rounds=rounds, deadline=deadline)
    measured: dict[str, Any] = {}
    for label, seconds in times.items():
        line: dict[str, Any] = {"seconds": statistics.median(seconds), "seconds_of_each_round": seconds}
        work = case.floor_work if label == "floor" else case.work
        if case.unit:
            line["rate"] = work / line["seconds"]
        if label != "floor":
            if case.floor is not None:
                scale = case.floor_work / case.work
                line["over_floor"] = method.ratio([t * scale for t in seconds], times["floor"])
            if label != OURS and OURS in times:
                line["over_cogsym"] = method.ratio(seconds, times[OURS])
        line |= case.counts.get(label, {})
        if device.type == "cuda":
            with variants[label].turn():
                line["launch_bound"] = method.launch_bound(variants[label].run, device)
        measured[label] = line
    floor = measured.pop("floor", None)
    return {
        "part": case.part,
        "name": case.name,
        **({"unit": case.unit, "work": case.work, "floor_work": case.floor_work} if case.unit else {}),
        "facts": case.facts,
        "variants": measured,
        "floor": floor,
        "skipped": case.skipped,
        "different": case.different,
        "seconds_spent": time.perf_counter() - start,
    }


def difference(values: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the truth, all tensors taken as one."""
    off = total = 0.0
    for a, b in zip(values, truth, strict=True):
        off += (a.double() - b.double()).square().sum().item()
        total += b.double().square().sum().item()
    return (off / total) ** 0.5 if total else off**0.5


def one_line(error: BaseException) -> str:
    """What an error says, in a line that a table can hold."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
