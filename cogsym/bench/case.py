"""One thing that is measured: variants that compute the same, a floor, and what is counted exactly."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogsym.bench import method
from cogsym.bench.method import Variant

OURS = "cogsym"
LEAST_LAYERS = 4  # of a model: the outer ones, and some between them
QUICK_ROUNDS = 1000  # more than there is time for: the time that is there ends a quick run's
SECONDS_A_VARIANT = 1.0  # that its rounds may take whatever time is left
# Norm of the difference over the norm of the truth that two ways of computing the same may have, at most: some ten
# roundings in a row for an operation. A step passes through every layer, and its gradients through it twice.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_EACH_ROUND = "_of_each_round"

Line = dict[str, Any]  # what a result file says of a case


@dataclass(frozen=True)
class Setting:
    """What a study is run with.

    Attributes:
        models: names or folders.
        device: where it runs.
        full: every case with all its rounds, or a quick look.
        dtype: the precision that is fastest here; a full run adds others that a user here would choose.
        scale: of the work in a case of a quick run, at most 1: fewer tokens and layers where products are slow.
        rate: FLOP/s of products in that precision, by which cases tell how long they take; infinite where the time does
            not matter.
        seconds: that it may take; None is as many as it takes.
        data: folder of texts, for a study that reads some.
        work: folder for what a study makes on its way, such as models.
        alternatives: training, sweeps and writing are set beside the alternatives, or measured alone.
    """

    models: tuple[str, ...]
    device: torch.device
    full: bool
    dtype: torch.dtype = torch.bfloat16
    scale: float = 1.0
    rate: float = math.inf
    seconds: float | None = None
    data: Path = Path()
    work: Path = Path()
    alternatives: bool = True

    def batch(self, rows: int, length: int) -> tuple[int, int]:
        """A batch of at most so many rows of at most so many tokens, scaled: fewer rows first, then shorter ones."""
        return max(1, int(rows * self.scale)), int(length * min(1.0, rows * self.scale))

    def layers(self, layers: int) -> int:
        """How many of so many layers are measured, scaled."""
        return min(layers, max(LEAST_LAYERS, int(layers * self.scale)))


@dataclass
class Case:
    """What is measured together.

    Attributes:
        variants: those that take turns; ours is called "cogsym", and starts with it where there are several. There are
            none where everything is counted.
        floor: what no method can do without, or None.
        work: of one call, and `floor_work` of one call of the floor; in `unit`.
        unit: "B" or "FLOP", of which rates are told; None where only time is.
        facts: counted numbers and settings, by name.
        counts: what else is known of each variant, by label: bytes kept, peak bytes, its settings.
        skipped: why others were not measured, by label.
        different: others that compute something else, by label, and how far off they are.
    """

    variants: dict[str, Variant] = field(default_factory=dict)
    floor: Callable[[], object] | None = None
    work: float = 1.0
    floor_work: float = 1.0
    unit: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseSpec:
    """A case that is built when its turn comes: models are large.

    Attributes:
        name: unique in its study; cases share a table where they agree up to the last ": ".
        build: makes it.
        rounds: at most, of a pass.
        passes: how often it is built and measured anew, other cases in between: short cases see the machine in more
            than one mood.
        seconds: that a pass takes at least, as far as it is known before it is built.
    """

    name: str
    build: Callable[[], Case]
    rounds: int = 15
    passes: int = 1
    seconds: float = 0.0

    @property
    def least_rounds(self) -> int:
        """Of a pass, whatever time is left."""
        return -(-method.LEAST_ROUNDS // self.passes)


def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    deadline: float | None = None,
    least: int = method.LEAST_ROUNDS,
) -> Line:
    """Everything a result file says of a case but its name, from one pass.

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
    warm_up = min(first.values(), default=0.0) < method.LONG_CALL
    if deadline is None and first.get(OURS, 0.0) >= method.LONG_CALL:
        rounds = min(rounds, least)  # a long call sees the machine in more than one mood
    if deadline is not None:
        left = max(deadline - time.perf_counter(), SECONDS_A_VARIANT)
        for label, seconds in first.items():
            if label not in (OURS, "floor") and (1 + warm_up) * least * seconds > left:
                skipped[label] = "a call takes too long for the time there is"
                del variants[label]
    measured = method.interleaved(variants, device, rounds=rounds, deadline=deadline, least=least, warm_up=warm_up)
    results: dict[str, dict[str, Any]] = {}
    for label, numbers in measured.items():
        results[label] = {name + _EACH_ROUND: values for name, values in numbers.items()} | case.counts.get(label, {})
        if device.type == "cuda":
            with variants[label].context():
                results[label]["launch_bound"] = method.launch_bound(variants[label].run, device)
    floor = results.pop("floor", None)
    line = {
        "unit": case.unit,
        "work": case.work,
        "floor_work": case.floor_work,
        "facts": case.facts,
        "variants": results,
        "floor": floor,
        "rounds_of_each_pass": [len(next(iter(measured.values()))["seconds"])] if measured else [],
        "skipped": skipped,
        "different": case.different,
    }
    return _with_ratios(line)


def join_passes(passes: list[Line]) -> Line:
    """The passes of one case as one; a variant that was left out of some is left out."""
    line = dict(passes[0])
    line["rounds_of_each_pass"] = [n for p in passes for n in p["rounds_of_each_pass"]]
    line["skipped"] = {label: reason for p in passes for label, reason in p["skipped"].items()}

    def join(pieces: list[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in pieces[0] if name.endswith(_EACH_ROUND)]
        return pieces[0] | {name: [value for piece in pieces for value in piece[name]] for name in names}

    line["variants"] = {
        label: join([p["variants"][label] for p in passes])
        for label in line["variants"]
        if all(label in p["variants"] for p in passes)
    }
    line["floor"] = join([p["floor"] for p in passes]) if line["floor"] else None
    return _with_ratios(line) if len(passes) > 1 else line


def _with_ratios(line: Line) -> Line:
    """Medians, rates and ratios from the numbers of each round."""
    variants, floor = line["variants"], line["floor"]
    for label, result in [*variants.items(), *([("floor", floor)] if floor else [])]:
        for name in [name for name in result if name.endswith(_EACH_ROUND)]:
            result[name.removesuffix(_EACH_ROUND)] = statistics.median(result[name])
        rounds = result["seconds_of_each_round"]
        if line["unit"]:
            result["rate"] = line["floor_work" if label == "floor" else "work"] / result["seconds"]
        if floor and label != "floor":
            scale = line["floor_work"] / line["work"]
            result["over_floor"] = method.ratio([t * scale for t in rounds], floor["seconds_of_each_round"])
        if label not in (OURS, "floor") and OURS in variants:
            result["over_cogsym"] = method.ratio(rounds, variants[OURS]["seconds_of_each_round"])
    return line


def difference(values: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the truth, all tensors taken as one."""
    squared_error = squared_truth = 0.0
    for a, b in zip(values, truth, strict=True):
        squared_error += (a.double() - b.double()).square().sum().item()
        squared_truth += b.double().square().sum().item()
    return (squared_error / squared_truth) ** 0.5 if squared_truth else squared_error**0.5


def error_line(error: BaseException) -> str:
    """What an error says, in a line that a table can hold."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
