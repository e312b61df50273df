"""A loop at its best settings, timed on some of the configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from cogsym.bench import method, report
from cogsym.bench.case import Case, Line, Setting, error_line
from cogsym.bench.loops import LOOPS, Loop, LoopOptions, Probe
from cogsym.sweeps.layers.configurations import Configuration

ATTENTIONS = ("sdpa", "eager")
SAMPLE = 6  # configurations that a loop is timed on


def tried_settings(
    run: Callable[[LoopOptions], object], requests: int, all_logits: Sequence[bool]
) -> dict[LoopOptions, float]:
    """Seconds of settings that were tried, the fastest first; one choice is varied after the other.

    Args:
        run: what is timed.
        requests: how many there are to a batch at most.
        all_logits: the ways of taking logits, as `LoopOptions` have them.
    """
    batches = [b for b in sorted({1, 4, 16, min(requests, 64)}) if b <= requests]
    seconds: dict[LoopOptions, float] = {}
    best = LoopOptions(ATTENTIONS[0], min(requests, 16))
    run(best)
    for vary in (
        lambda now: [replace(now, attention=a, all_logits=way) for a in ATTENTIONS for way in all_logits],
        lambda now: [replace(now, batch=b) for b in batches],
    ):
        seconds |= method.fastest({s: partial(run, s) for s in vary(best) if s not in seconds})
        best = min(seconds, key=seconds.__getitem__)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def evenly_spaced(items: Sequence[Configuration], number: int) -> list[Configuration]:
    """So many of them, one from the middle of each of as many equal shares of those sorted by the layers they keep.

    Where the middle lies between two, it is the one before and the one after in turn, so that layers balance.
    """
    ordered = sorted(items, key=lambda c: (-c.k, c.code))
    number = min(number, len(ordered))
    chosen = []
    for i in range(number):
        before, rest = divmod((2 * i + 1) * len(ordered) - number, 2 * number)
        chosen.append(ordered[before + (rest + i % 2 > number)])
    return chosen


def sample_facts(sample: Sequence[Configuration], every: Sequence[Configuration]) -> dict[str, Any]:
    """What a loop is timed on, and how many layers those configurations keep on average beside all of them."""

    def kept(some: Sequence[Configuration]) -> float:
        return sum(len(c.actions) - c.k for c in some) / len(some)

    return {
        "configurations_timed": len(sample),
        "kept_layers_of_those": kept(sample),
        "kept_layers_of_all": kept(every),
    }


@dataclass(frozen=True)
class Question:
    """What a loop is asked of each configuration.

    Attributes:
        ask: (loop, configuration, settings) -> its answer.
        error: how far answers for the sample are from the truth.
        allowed: how far they may be.
        complaint: the sentence that says that they are further, with a place for how far.
        sample: the configurations that are timed.
        configurations: how many there are in all.
        requests: of each of them.
        all_logits: the ways of taking logits, as `LoopOptions` have them.
    """

    ask: Callable[..., Any]
    error: Callable[[list[Any]], float]
    allowed: float
    complaint: str
    sample: Sequence[Configuration]
    configurations: int
    requests: int
    all_logits: Sequence[bool]

    def ask_sample(self, settings: LoopOptions, loop: Loop) -> list[Any]:
        """The answers for every configuration of the sample."""
        return [self.ask(loop, configuration, settings) for configuration in self.sample]


def add_loops(result: Case, setting: Setting, probe: Probe, question: Question) -> None:
    """Give a case the loops that compute the same, at their best settings for half of the layers."""
    sample = question.sample
    layers = len(sample[0].actions)
    half = Configuration.of(layers, {"skip": range(layers - layers // 2)})
    for competitor in LOOPS if setting.alternatives else ():
        if reason := competitor.unavailable(setting.device, setting.full):
            result.skipped[competitor.name] = reason
            continue
        try:
            with competitor.applied(probe) as loop:
                tried = tried_settings(partial(question.ask, loop, half), question.requests, question.all_logits)
                settings = next(iter(tried))
                error = question.error(question.ask_sample(settings, loop))
        except Exception as failure:  # another library's: whatever it raises is its reason
            result.skipped[competitor.name] = error_line(failure)
            continue
        if not error <= question.allowed:
            result.different[competitor.name] = question.complaint.format(error)
            continue
        scale = question.configurations / len(sample)
        result.variants[competitor.name] = competitor.variant(probe, partial(question.ask_sample, settings), scale)
        with competitor.applied(probe) as loop:
            peak = method.peak_bytes(partial(question.ask, loop, sample[0], settings), setting.device)
        result.counts[competitor.name] = {
            "peak_bytes": peak,
            "difference": error,
            "settings": asdict(settings),
            "seconds_of_settings_tried": [[asdict(s), t] for s, t in tried.items()],
        }


def table(done: str) -> Callable[[list[Line]], report.Table]:
    """Tables of what is asked: `done` of them a second."""

    def cells(line: Line, result: dict[str, Any]) -> dict[str, str]:
        return {
            "seconds": f"{result['seconds']:.3g}",
            f"{done} a second": f"{line['facts']['done'] / result['seconds']:,.0f}",
            "over the floor": f"{result['over_floor']['median']:.2f}",
            "time / cogsym": report.spread(result.get("over_cogsym")),
            "peak, MB": f"{result['peak_bytes'] / 1e6:,.0f}",
        }

    return report.by_variant(cells)
