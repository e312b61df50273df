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
SHORT = 1.0  # seconds that the rounds of a variant may take whatever is left
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
        part: the question it belongs to, as `cogsym bench` takes it.
        name: unique in its part.
        variants: those that take turns; ours is called "cogsym", and starts with it where there are several.
        floor: what no method can do without, or None.
        work: of one call, and `floor_work` of one call of the floor; in `unit`.
        unit: "B" or "FLOP", of which rates are told; None where only time is.
        facts: counted numbers and settings, by name.
        counts: what else is known of each variant, by label: bytes kept, peak bytes, its settings.
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
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pending:
    """A case that is made when its turn comes: models are large.

    Attributes:
        name: what is shown meanwhile.
        build: makes it.
        rounds: at most, of a pass.
        passes: how often it is made and measured anew, other cases in between: short cases see the machine in more than
            one mood.
    """

    name: str
    build: Callable[[], Case]
    rounds: int = 15
    passes: int = 1


def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    deadline: float | None = None,
    least: int = method.LEAST_ROUNDS,
) -> dict[str, Any]:
    """Everything a result file says of a case, from one pass.

    Args:
        case: its variants are run.
        device: where.
        rounds: at most.
        deadline: of `time.perf_counter`, after which no round begins.
        least: rounds that are made even so.
    """
    variants = dict(case.variants)
    if case.floor is not None:
        variants["floor"] = Variant(case.floor)
    first = method.first_calls(variants, device)
    skipped = dict(case.skipped)
    warm = min(first.values(), default=0.0) < method.LONG
    if first.get(OURS, 0.0) >= method.LONG:
        rounds = min(rounds, least)  # a long call sees the machine in more than one mood
    if deadline is not None:
        left = max(deadline - time.perf_counter(), SHORT)
        for label, once in first.items():
            if label not in (OURS, "floor") and (1 + warm) * least * once > left:
                skipped[label] = "a call takes too long for the time there is"
                del variants[label]
    times = method.interleaved(variants, device, rounds=rounds, deadline=deadline, least=least, warm=warm)
    measured: dict[str, dict[str, Any]] = {}
    for label, seconds in times.items():
        measured[label] = {"seconds_of_each_round": seconds, **case.counts.get(label, {})}
        if device.type == "cuda":
            with variants[label].turn():
                measured[label]["launch_bound"] = method.launch_bound(variants[label].run, device)
    floor = measured.pop("floor", None)
    line = {
        "part": case.part,
        "name": case.name,
        "unit": case.unit,
        "work": case.work,
        "floor_work": case.floor_work,
        "facts": case.facts,
        "variants": measured,
        "floor": floor,
        "rounds_of_each_pass": [len(next(iter(times.values())))] if times else [],
        "skipped": skipped,
        "different": case.different,
    }
    return _with_ratios(line)


def joined(passes: list[dict[str, Any]]) -> dict[str, Any]:
    """The passes of one case as one; a variant that was left out of some is left out."""
    line = dict(passes[0])
    line["rounds_of_each_pass"] = [n for p in passes for n in p["rounds_of_each_pass"]]
    line["skipped"] = {label: reason for p in passes for label, reason in p["skipped"].items()}

    def together(pieces: list[dict[str, Any]]) -> dict[str, Any]:
        return pieces[0] | {"seconds_of_each_round": [t for p in pieces for t in p["seconds_of_each_round"]]}

    line["variants"] = {
        label: together([p["variants"][label] for p in passes])
        for label in line["variants"]
        if all(label in p["variants"] for p in passes)
    }
    line["floor"] = together([p["floor"] for p in passes]) if line["floor"] else None
    return _with_ratios(line)


def _with_ratios(line: dict[str, Any]) -> dict[str, Any]:
    """Medians, rates and ratios from the seconds of each round."""
    variants, floor = line["variants"], line["floor"]
    for label, it in [*variants.items(), *([("floor", floor)] if floor else [])]:
        rounds = it["seconds_of_each_round"]
        it["seconds"] = statistics.median(rounds)
        if line["unit"]:
            it["rate"] = line["floor_work" if label == "floor" else "work"] / it["seconds"]
        if floor and label != "floor":
            scale = line["floor_work"] / line["work"]
            it["over_floor"] = method.ratio([t * scale for t in rounds], floor["seconds_of_each_round"])
        if label not in (OURS, "floor") and OURS in variants:
            it["over_cogsym"] = method.ratio(rounds, variants[OURS]["seconds_of_each_round"])
    return line


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


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
