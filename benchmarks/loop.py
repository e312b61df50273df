"""The plain way to evaluate layer configurations: a loop over transformers models with only the layers that are kept.

A configuration's model shares the modules of the whole one; only its list of layers is another, as a user would slice
it. The loop gets its best settings: `fastest` tries them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn import functional as F

from cogsym.bench import method
from cogsym.sweeps.configs import Configuration, configurations, distinct
from cogsym.sweeps.requests import Document, Score
from cogsym.sweeps.tasks import load_task

SEPARATOR = "<|endoftext|>"
CONTEXT = 2048
MOST_OTHERS = 0.05  # of the processors that other work may take where a case is to count


@dataclass(frozen=True)
class Settings:
    """What the loop may choose.

    Attributes:
        attention: implementation of transformers.
        batch: sequences at a time.
        all_logits: take the model's logits at every position, or the head at those scored alone.
    """

    attention: str
    batch: int
    all_logits: bool = False


@contextmanager
def sliced(model: Any, configuration: Configuration) -> Iterator[Any]:
    """The model with only the layers that a configuration keeps."""
    decoder, every = model.model, model.model.layers
    kept = [i for i, action in enumerate(configuration.actions) if action == "keep"]
    decoder.layers, model.config.num_hidden_layers = nn.ModuleList(every[i] for i in kept), len(kept)
    for place, i in enumerate(kept):
        every[i].self_attn.layer_idx = place  # where the cache keeps its keys
    try:
        yield model
    finally:
        decoder.layers, model.config.num_hidden_layers = every, len(every)
        for i, layer in enumerate(every):
            layer.self_attn.layer_idx = i


def task_documents(name: str, data: Path, tokenizer: Any) -> list[Document]:
    """The documents of a task of the benchmark."""
    where = {
        "xcopa-sw": f"xcopa-sw:{data / 'xcopa' / 'sw.test.jsonl'}",
        "ntrex-sw": f"text:{data / 'ntrex-128' / 'swa.jsonl'}#text,language=sw",
    }
    return load_task(where[name], SEPARATOR).documents(tokenizer, CONTEXT)


def chosen(what: str, layers: int) -> list[Configuration]:
    """Distinct configurations."""
    return distinct(configurations(what, layers))[0]


def spaced(items: Sequence[Configuration], number: int) -> list[Configuration]:
    """So many of them, evenly spaced over those sorted by how many layers they keep."""
    ordered = sorted(items, key=lambda c: (-c.k, c.code))
    return [ordered[round(i * (len(ordered) - 1) / max(1, number - 1))] for i in range(min(number, len(ordered)))]


@torch.inference_mode()
def likelihoods(model: Any, requests: Sequence[Score], settings: Settings) -> list[float]:
    """The log-likelihood of each continuation, by a right-padded batch of requests of like length after the other."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    result = [0.0] * len(requests)
    for begin in range(0, len(order), settings.batch):
        group = order[begin : begin + settings.batch]
        rows = [requests[i].tokens for i in group]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        for row, i in enumerate(group):
            targets[row, : requests[i].first - 1] = -100
        wanted = targets >= 0
        if settings.all_logits:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][wanted]
        else:
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][wanted])
        losses = torch.zeros(wanted.shape)
        losses[wanted] = F.cross_entropy(logits.float(), targets[wanted], reduction="none")
        for i, loss in zip(group, losses.double().sum(1).tolist(), strict=True):
            result[i] = -loss
    return result


def fastest(
    run: Callable[[Settings], object], candidates: Sequence[Callable[[Settings], list[Settings]]], first: Settings
) -> Any:
    """(The fastest settings, seconds of each tried). One choice is varied after the other."""
    seconds: dict[Settings, float] = {}
    best = first
    for vary in candidates:
        for settings in vary(best):
            if settings not in seconds:
                if not seconds:
                    run(settings)
                seconds[settings] = min(timed(lambda settings=settings: run(settings)) for _ in range(2))
        best = min(seconds, key=seconds.__getitem__)
    return best, seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Watch:
    """How much of the processors other work takes: short products suffer more from it than large ones."""

    def __init__(self) -> None:
        self._before = self._times()

    def others(self) -> float:
        """Their share since this was made, of all processors."""
        wall, busy, own = (now - before for now, before in zip(self._times(), self._before, strict=True))
        return max(0.0, busy - own) / (wall * psutil.cpu_count())

    @staticmethod
    def _times() -> tuple[float, float, float]:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        return time.perf_counter(), every.user + every.system + every.nice, own.user + own.system


def turns(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; they take turns, each called before."""
    each = {label: method.Variant(run, warm=False) for label, run in variants.items()}
    return method.interleaved(each, torch.device("cpu"), rounds=rounds, seconds=0.3)


def extrapolated(sample: Sequence[Configuration], seconds: Sequence[float], every: Sequence[Configuration]) -> Any:
    """What a loop over every configuration takes, from a sample's times: a line through them by the number of layers
    kept, so much a layer and so much for the rest.

    Returns:
        (seconds in all, how far the line is off the sample's sum at most by leaving one out, as a share)
    """

    def line(chosen: Sequence[int]) -> float:
        kept = [len(sample[i].actions) - sample[i].k for i in chosen]
        slope, rest = np.polyfit(kept, [seconds[i] for i in chosen], 1)
        return float(sum(slope * (len(c.actions) - c.k) + rest for c in every))

    everything = range(len(sample))
    total = line(everything)
    without = [line([j for j in everything if j != i]) for i in everything]
    return total, max(abs(other / total - 1) for other in without)


def outcome(
    settings: Settings,
    tried: dict[Settings, float],
    sample: Sequence[Configuration],
    every: Sequence[Configuration],
    seconds: dict[str, list[float]],
    floors: list[float],
    watch: Watch,
) -> dict[str, Any]:
    """What a case's result says of times: ours, the loop's from its sample, and the floor's, by round."""
    of_sample = [[seconds[c.code][i] for c in sample] for i in range(len(floors))]
    loops = [extrapolated(sample, times, every) for times in of_sample]
    rounds = {"cogsym": seconds["cogsym"], "loop": [total for total, _ in loops], "floor": floors}
    return {
        "share_of_processors_used_by_others": watch.others(),
        "loop": {
            "settings": asdict(settings),
            "seconds_of_settings_tried": [[asdict(s), t] for s, t in tried.items()],
            "configurations_timed": len(sample),
            "largest_change_by_leaving_one_out": max(change for _, change in loops),
        },
        "seconds": {name: statistics.median(times) for name, times in rounds.items()},
        "seconds_of_each_round": {**rounds, "loop_sample": of_sample},
        "loop_over_cogsym": method.ratio(rounds["loop"], rounds["cogsym"]),
        "cogsym_over_floor": method.ratio(rounds["cogsym"], floors),
    }
