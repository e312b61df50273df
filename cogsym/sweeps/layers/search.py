"""Searches: configurations that are chosen, round by round, by what those before them have measured.

Another package adds one with `register_search`, or with an entry point of the group "cogsym.searches" (see
`cogsym.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cogsym.registry import Registry

if TYPE_CHECKING:
    from cogsym.sweeps.layers.configurations import Configuration


@dataclass(frozen=True)
class SearchSettings:
    """What a user tells a search.

    Attributes:
        num_layers: decoder layers in the model, L.
        action: what is done to the layers that it chooses.
        remove: how many layers are to go; None leaves it to the search.
        width: how many sets of layers are followed; None leaves it to the search.
    """

    num_layers: int
    action: str
    remove: int | None = None
    width: int | None = None


class Round(NamedTuple):
    """What a round asks at most.

    Attributes:
        configurations: a list of them.
        times: the round costs no more than this many such lists.
    """

    configurations: list[Configuration]
    times: int


class Search(Protocol):
    """Chooses configurations."""

    def planned(self) -> Iterator[Round]:
        """What the rounds ask at most, whatever is measured: for the plan of the sweep."""

    def run(
        self,
        ask: Callable[[list[Configuration]], Mapping[str, float]],
        higher_is_better: bool,
        report: Callable[[str, float], None],
    ) -> Configuration:
        """Ask, choose, ask again; what is found in the end.

        Args:
            ask: the value of configurations, by code, those asked before among them.
            higher_is_better: whether it is.
            report: told after each round what was chosen, in words, and its value.
        """


SEARCHES = Registry[Callable[[SearchSettings], Search]]("search", "cogsym.searches")


def register_search(name: str, search: Callable[[SearchSettings], Search]) -> None:
    """Make a search known under a name, with which a sweep names it in the place of configurations.

    Args:
        name: the name.
        search: makes it, and raises CogsymError where the settings do not fit.

    Raises:
        CogsymError: the name is another search's.
    """
    SEARCHES.register(name, search)
