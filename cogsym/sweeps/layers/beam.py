"""Beam search for layers that can go: each round tries every layer that is left, and follows the best few choices.

How much a layer is missed depends on what has gone, so each is tried anew in every round. The candidates of a round
share their states as configurations always do: without one set of layers, of which R are left, they take
(R - 1)(R + 2) / 2 forwards, R - 1 on a path that all of them share, and in the first round R (R + 1) / 2 with the whole
model. The candidates of W sets are merged where they are the same and take at most W times as many. Nothing is kept for
the next round: of its shared path only the part before the layer that went would be the same, less than 2 / (R + 2) of
its forwards, for R states of every document.

A beam of width 1 is the greedy search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from cogsym.errors import CogsymError
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.search import Round, SearchSettings, register_search

_WIDTH = 4  # of a beam unless told


@dataclass(frozen=True)
class BeamSearch:
    """The search.

    Attributes:
        num_layers: decoder layers in the model, L.
        action: what is done to those that go.
        remove: how many are to go.
        width: how many sets of layers are followed.
    """

    num_layers: int
    action: str
    remove: int
    width: int

    def __post_init__(self) -> None:
        if not 1 <= self.remove <= self.num_layers:
            raise CogsymError(
                f"The search is to remove {self.remove} layers, expected 1 to {self.num_layers}; the model has "
                f"{self.num_layers}."
            )
        if self.width < 1:
            raise CogsymError(f"The width of the search is {self.width}, expected 1 set of layers or more.")

    def candidates(self, beam: Iterable[frozenset[int]]) -> dict[frozenset[int], Configuration]:
        """The sets of layers with one layer more than those of `beam`, each once, and the configuration of each."""
        sets = (gone | {i} for gone in beam for i in range(self.num_layers) if i not in gone)
        return {gone: self._without(gone) for gone in dict.fromkeys(sets)}

    def planned(self) -> Iterator[Round]:
        """What the rounds ask where the last layers go: no choice takes more."""
        for number in range(self.remove):
            gone = frozenset(range(self.num_layers - number, self.num_layers))
            asked = list(self.candidates([gone]).values())
            yield Round(
                asked if number else [self._without(gone), *asked], min(self.width, math.comb(self.num_layers, number))
            )

    def run(
        self,
        ask: Callable[[list[Configuration]], Mapping[str, float]],
        higher_is_better: bool,
        report: Callable[[str, float], None],
    ) -> Configuration:
        """The configuration without the layers that are missed least; see `Search.run`."""
        beam = [frozenset[int]()]
        for number in range(self.remove):
            tried, before = self.candidates(beam), beam[0]
            asked = list(tried.values())
            values = ask(asked if number else [self._without(before), *asked])
            losses = {gone: -values[c.code] if higher_is_better else values[c.code] for gone, c in tried.items()}
            beam = sorted(tried, key=lambda gone: (math.isnan(losses[gone]), losses[gone]))[: self.width]
            best = tried[beam[0]]
            (words,) = (f"layer {i} goes" for i in beam[0] - before) if self.width == 1 else (f"best is {best}",)
            report(words, values[best.code])
        return best

    def _without(self, gone: frozenset[int]) -> Configuration:
        return Configuration.of(self.num_layers, {self.action: sorted(gone)})


def _beam(settings: SearchSettings) -> BeamSearch:
    """Half of the layers go, and four sets are followed, unless told."""
    layers, remove, width = settings.num_layers, settings.remove, settings.width
    return BeamSearch(
        layers, settings.action, layers // 2 if remove is None else remove, _WIDTH if width is None else width
    )


def _greedy(settings: SearchSettings) -> BeamSearch:
    if settings.width not in (None, 1):
        raise CogsymError(
            f"The width is {settings.width} and the search greedy follows one set of layers; search with beam."
        )
    return _beam(SearchSettings(settings.num_layers, settings.action, settings.remove, 1))


register_search("greedy", _greedy)
register_search("beam", _beam)
