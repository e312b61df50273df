"""A loop at its best settings, timed on some of the configurations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from cogsym.bench import method
from cogsym.bench.case import Case, Setting, one_line
from cogsym.bench.competitor import Competitor, Turn
from cogsym.bench.loops import LOOPS, Loop, Probe, Settings
from cogsym.bench.method import Variant
from cogsym.sweeps.layers.configurations import Configuration

ATTENTIONS = ("sdpa", "eager")
SAMPLE = 6  # configurations that a loop is timed on


def fastest(run: Callable[[Settings], object], requests: int, ways: Sequence[bool]) -> dict[Settings, float]:
    """Seconds of settings that were tried, the fastest first; one choice is varied after the other.

    Args:
        run: what is timed.
        requests: how many there are to a batch at most.
        ways: of taking logits, as `Settings.all_logits` has them.
    """
    batches = [b for b in sorted({1, 4, 16, min(requests, 64)}) if b <= requests]
    seconds: dict[Settings, float] = {}
    best = Settings(ATTENTIONS[0], min(requests, 16))
    run(best)
    for vary in (
        lambda now: [replace(now, attention=a, all_logits=way) for a in ATTENTIONS for way in ways],
        lambda now: [replace(now, batch=b) for b in batches],
    ):
        for settings in vary(best):
            if settings not in seconds:
                seconds[settings] = min(timed(partial(run, settings)) for _ in range(2))
        best = min(seconds, key=seconds.__getitem__)
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call whose answer is on the host."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spaced(items: Sequence[Configuration], number: int) -> list[Configuration]:
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


def shares(sample: Sequence[Configuration], every: Sequence[Configuration]) -> dict[str, Any]:
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
        off: how far answers for the sample are from the truth.
        allowed: how far they may be.
        further: the sentence that says that they are further, with a place for how far.
        sample: the configurations that are timed.
        configurations: how many there are in all.
        requests: of each of them.
        ways: of taking logits, as `Settings.all_logits` has them.
    """

    ask: Callable[..., Any]
    off: Callable[[list[Any]], float]
    allowed: float
    further: str
    sample: Sequence[Configuration]
    configurations: int
    requests: int
    ways: Sequence[bool]


def add_loops(result: Case, setting: Setting, probe: Probe, question: Question) -> None:
    """Give a case the loops that compute the same, at their best settings for half of the layers."""
    sample = question.sample
    layers = len(sample[0].actions)
    half = Configuration.of(layers, {"skip": range(layers - layers // 2)})
    for competitor in LOOPS:
        if reason := competitor.unavailable(setting.device, setting.full):
            result.skipped[competitor.name] = reason
            continue
        try:
            with competitor.turn(probe) as loop:
                tried = fastest(partial(question.ask, loop, half), question.requests, question.ways)
                settings = next(iter(tried))
                distance = question.off([question.ask(loop, c, settings) for c in sample])
        except Exception as error:  # another library's: whatever it raises is its reason
            result.skipped[competitor.name] = one_line(error)
            continue
        if not distance <= question.allowed:
            result.different[competitor.name] = question.further.format(distance)
            continue
        turn = _Turn(competitor, probe, question, settings)
        scale = question.configurations / len(sample)
        result.variants[competitor.name] = Variant(turn.ask, turn.entered, scale=scale)
        with competitor.turn(probe) as loop:
            peak = method.peak_bytes(partial(question.ask, loop, sample[0], settings), setting.device)
        result.counts[competitor.name] = {
            "peak_bytes": peak,
            "difference": distance,
            "settings": asdict(settings),
            "seconds_of_settings_tried": [[asdict(s), t] for s, t in tried.items()],
        }


class _Turn(Turn[Probe, Loop]):
    """A loop's turn over the sample."""

    def __init__(
        self, competitor: Competitor[Probe, Loop], probe: Probe, question: Question, settings: Settings
    ) -> None:
        super().__init__(competitor, probe)
        self._question, self._settings = question, settings

    def ask(self) -> None:
        """Every configuration of the sample."""
        for configuration in self._question.sample:
            self._question.ask(self.way, configuration, self._settings)
