"""A greedy search for layers that can go: each round tries every layer that is left, and the one missed least goes.

How much a layer is missed depends on what has gone, so each is tried anew in every round. The candidates of a round
share their states as configurations always do: of R layers left they take (R - 1)(R + 2) / 2 forwards, R - 1 on a path
that all of them share. Nothing is kept for the next round: of its shared path only the part before the layer that went
would be the same, less than 2 / (R + 2) of its forwards, for R states of every document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cogsym.sweeps.layers.configurations import Configuration


@dataclass(frozen=True)
class Greedy:
    """The search.

    Attributes:
        num_layers: decoder layers in the model, L.
        remove: how many are to go.
        action: what is done to those that go.
    """

    num_layers: int
    remove: int
    action: str

    def candidates(self, gone: Sequence[int]) -> dict[int, Configuration]:
        """For each layer that is left the configuration without it too."""
        left = [i for i in range(self.num_layers) if i not in gone]
        return {i: Configuration.of(self.num_layers, {self.action: [*gone, i]}) for i in left}

    def first(self) -> list[Configuration]:
        """What the first round asks: the whole model and every candidate."""
        return [Configuration.of(self.num_layers, {}), *self.candidates([]).values()]

    def planned(self) -> Iterator[list[Configuration]]:
        """What the rounds ask where the last layers go: no choice takes more."""
        for number in range(self.remove):
            gone = range(self.num_layers - number, self.num_layers)
            yield list(self.candidates(gone).values()) if number else self.first()

    def run(
        self,
        ask: Callable[[list[Configuration]], Mapping[str, float]],
        higher_is_better: bool,
        tell: Callable[[int, float], None],
    ) -> list[int]:
        """The layers that go, in their order.

        Args:
            ask: the value of configurations, by code.
            higher_is_better: whether it is.
            tell: told which layer goes and the value without it.
        """
        gone: list[int] = []
        for number in range(self.remove):
            candidates = self.candidates(gone)
            values = ask(list(candidates.values()) if number else self.first())
            losses = {i: -values[c.code] if higher_is_better else values[c.code] for i, c in candidates.items()}
            best = min(candidates, key=lambda i: (math.isnan(losses[i]), losses[i]))
            gone.append(best)
            tell(best, values[candidates[best].code])
        return gone
