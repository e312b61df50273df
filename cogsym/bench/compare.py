"""A regression or noise? Two result files of the same machine, the second measured after a change.

What is compared is the time of ours over the floor's in the same round, or over the first competitor's where there is
no floor: what else the machine did falls on both. From the spread of its rounds follows how far the medians of two runs
of the same code may lie apart; a change counts where it is more than that, and more than `LEAST`, and anything less is
called noise. Counted bytes have no noise: any more of them is a regression.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from cogsym.bench import method
from cogsym.bench.case import OURS
from cogsym.errors import CogsymError

LEAST = 0.05  # two runs of the same code differ by up to this, however many rounds they have
COUNTED = ("kept_bytes_a_token",)
# What a time depends on besides the code; versions of libraries may be what is compared.
_SAME = ("processor", "cores", "threads", "gpu")


@dataclass(frozen=True)
class Change:
    """What became of one number.

    Attributes:
        case: its case and variant.
        what: "time" or what is counted.
        before: in the first file, with the spread.
        after: in the second.
        noise: what a change must exceed to count, relative.
        verdict: "regression", "improvement" or "noise"; "same" for an equal count.
    """

    case: str
    what: str
    before: dict[str, float]
    after: dict[str, float]
    noise: float
    verdict: str

    @property
    def change(self) -> float:
        """Relative."""
        return self.after["median"] / self.before["median"] - 1


def compare(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str] = ("A", "B")) -> list[Change]:
    """What changed from `a` to `b`.

    Raises:
        CogsymError: files of different machines or settings, or without a case in common.
    """
    for field in _SAME:
        mine, other = a["machine"].get(field), b["machine"].get(field)
        if mine != other:
            raise CogsymError(
                f"{names[0]} and {names[1]} cannot be compared: {field} is {mine!r} in the first and {other!r} in the "
                "second; measure both on one machine."
            )
    before = {(c["part"], c["name"]): c for c in a["cases"]}
    after = {(c["part"], c["name"]): c for c in b["cases"]}
    shared = [key for key in before if key in after]
    if not shared:
        raise CogsymError(
            f"{names[0]} and {names[1]} have no case in common; run both with the same parts, --model and "
            "--quick or --full."
        )
    changes = []
    for key in shared:
        for label in before[key]["variants"]:
            if label.split(",")[0] == OURS and label in after[key]["variants"]:
                changes += _changes(f"{key[1]} [{label}]", label, before[key], after[key])
    return changes


def show(changes: list[Change], console: Console) -> bool:
    """Print them; whether there is a regression."""
    table = Table()
    for i, name in enumerate(("case", "", "before", "after", "change", "noise", "verdict")):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for c in changes:
        if c.what == "time" or c.verdict != "same":
            table.add_row(
                c.case, c.what, _shown(c.before), _shown(c.after), f"{c.change:+.1%}", f"{c.noise:.1%}", c.verdict
            )
    console.print(table)
    regressions = sum(c.verdict == "regression" for c in changes)
    console.print(f"{regressions} regressions among {len(changes)} numbers", highlight=False)
    return regressions > 0


def _changes(name: str, label: str, before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    found = []
    other = _other(label, before, after)
    if other is not None:
        was, now = (method.ratio(_rounds(case, label), _rounds(case, other)) for case in (before, after))
        noise = _noise([(case, label, other) for case in (before, after)])
        found.append(Change(name, "time", was, now, noise, _verdict(now["median"] / was["median"] - 1, noise)))
    for what in COUNTED:
        a, b = before["variants"][label].get(what), after["variants"][label].get(what)
        if a and b is not None:
            verdict = "same" if a == b else "regression" if b > a else "improvement"
            found.append(Change(name, what, {"median": a}, {"median": b}, 0.0, verdict))
    return found


def _other(label: str, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What the time is divided by: the floor, else the first that is not ours, whose rounds are known in both."""
    known = [name for name in ("floor", *before["variants"]) if _rounds(before, name) and _rounds(after, name)]
    others = [name for name in known if name.split(",")[0] != OURS]
    return others[0] if others and label in known else None


def _rounds(case: dict[str, Any], label: str) -> list[float]:
    result = case["floor"] if label == "floor" else case["variants"].get(label)
    times: list[float] = (result or {}).get("seconds_of_each_round", [])
    return times


def _noise(sides: list[tuple[dict[str, Any], str, str]]) -> float:
    """What two medians of the same code differ by once in a thousand times, relative, and at least `LEAST`.

    A normal distribution's quartiles are 1.349 of its deviations apart, and the median of n values deviates by 1.253 /
    √n of them; where a case was measured in several passes, by no less than the medians of these tell. Three such
    deviations; more where few rounds say little of the spread, nearly as Student's t has it.
    """
    variance, rounds = 0.0, 0
    for case, label, other in sides:
        ours, theirs = _rounds(case, label), _rounds(case, other)
        whole = method.ratio(ours, theirs)
        own = (1.253 / 1.349 * (whole["upper"] - whole["lower"])) ** 2 / len(ours)
        ends = [0, *accumulate(case["rounds_of_each_pass"])]
        medians = [method.ratio(ours[i:j], theirs[i:j])["median"] for i, j in pairwise(ends)]
        between = statistics.variance(medians) / len(medians) if len(medians) > 1 else 0.0
        variance += max(own, between) / whole["median"] ** 2
        rounds += len(ours)
    return max(LEAST, 3 * (1 + 6 / max(rounds - 2, 1)) * math.sqrt(variance))


def _verdict(change: float, noise: float) -> str:
    if abs(change) <= noise:
        return "noise"
    return "regression" if change > 0 else "improvement"


def _shown(ratio: dict[str, float]) -> str:
    if "lower" not in ratio:
        return f"{ratio['median']:,.0f}"
    return f"{ratio['median']:.3g} ({ratio['lower']:.3g} to {ratio['upper']:.3g})"
