"""Layer configurations: what each decoder layer does, and the sets of them that answer a question.

A configuration names an action of `cogsym.sweeps.layers.actions` for every layer. Its code is one letter a layer, in
order from the embeddings, and is its name in results:

    .   keep             the layer as it is
    s   skip             both of its contributions to the residual stream are gone: the layer is the identity
    a   skip_attention   only the MLP's contribution is left
    m   skip_mlp         only attention's contribution is left
    r   revert           the layer with the weights of a second, base checkpoint
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cogsym import user_files
from cogsym.errors import CogsymError
from cogsym.registry import unknown
from cogsym.strategies import format_layers, parse_layers
from cogsym.sweeps.layers.actions import ACTIONS, KEEP, SKIP
from cogsym.sweeps.layers.search import SEARCHES

Direction = Literal["none", "input", "output", "all", "both", "single", "block", "other"]


@dataclass(frozen=True)
class Configuration:
    """An action for every layer.

    Attributes:
        actions: of layer 0, next to the embeddings, to layer L - 1.
    """

    actions: tuple[str, ...]

    def __post_init__(self) -> None:
        for action in set(self.actions):
            ACTIONS[action]

    @classmethod
    def of(cls, num_layers: int, changes: Mapping[str, Iterable[int]]) -> Configuration:
        """Every layer kept but those named.

        Args:
            num_layers: decoder layers in the model, L.
            changes: action -> the layers it acts on.

        Raises:
            CogsymError: a layer that there is not, a layer named twice, or an unknown action.
        """
        actions: dict[int, str] = {}
        for action, layers in changes.items():
            ACTIONS[action]
            for layer in layers:
                if not isinstance(layer, int) or not 0 <= layer < num_layers:
                    raise CogsymError(
                        f"The configuration has {action} for layer {layer}, expected a layer from 0 to "
                        f"{num_layers - 1}; the model has {num_layers}."
                    )
                if layer in actions:
                    raise CogsymError(f"The configuration names layer {layer} twice, expected one action a layer.")
                actions[layer] = action
        return cls(tuple(actions.get(i, KEEP) for i in range(num_layers)))

    @cached_property
    def code(self) -> str:
        """One letter a layer, as at the head of this module."""
        return "".join(ACTIONS[action].letter for action in self.actions)

    @cached_property
    def changed(self) -> tuple[int, ...]:
        """The layers that are not kept, ascending."""
        return tuple(i for i, action in enumerate(self.actions) if action != KEEP)

    @property
    def k(self) -> int:
        """How many layers are not kept."""
        return len(self.changed)

    @property
    def front(self) -> int:
        """How many of the first layers are not kept, up to the first that is."""
        return next((i for i, action in enumerate(self.actions) if action == KEEP), len(self.actions))

    @property
    def back(self) -> int:
        """How many of the last layers are not kept, down from the last layer."""
        return next((i for i, action in enumerate(reversed(self.actions)) if action == KEEP), len(self.actions))

    @property
    def direction(self) -> Direction:
        """Which layers are changed: "none", the first ("input"), the last ("output"), "all", first and last ("both"),
        one in the middle ("single"), a contiguous "block" in the middle, or an "other" choice.

        Read off the actions, so that a configuration is one and the same in every set that holds it.
        """
        if self.k in (0, len(self.actions)):
            return "all" if self.k else "none"
        if self.k == self.front + self.back:
            return "both" if self.front and self.back else "input" if self.front else "output"
        if self.k == 1:
            return "single"
        return "block" if self.k == self.changed[-1] - self.changed[0] + 1 else "other"

    def __str__(self) -> str:
        """Such as "skip 0-3 and 28-29"."""
        layers: dict[str, list[int]] = {}
        for i in self.changed:
            layers.setdefault(self.actions[i], []).append(i)
        words = [f"{action.replace('_', ' ')} {format_layers(where)}" for action, where in layers.items()]
        return ", ".join(words) or "keep every layer"


def input_direction(num_layers: int, action: str = SKIP) -> list[Configuration]:
    """The first k layers, for every k from 0 to L."""
    return [Configuration.of(num_layers, {action: range(k)}) for k in range(num_layers + 1)]


def output_direction(num_layers: int, action: str = SKIP) -> list[Configuration]:
    """The last k layers, for every k from 0 to L."""
    return [Configuration.of(num_layers, {action: range(num_layers - k, num_layers)}) for k in range(num_layers + 1)]


def grid(num_layers: int, action: str = SKIP) -> list[Configuration]:
    """The first a and the last b layers, for every a + b <= L: (L + 1)(L + 2) / 2 pairs, L fewer distinct ones."""
    return [
        Configuration.of(num_layers, {action: (*range(a), *range(num_layers - b, num_layers))})
        for a in range(num_layers + 1)
        for b in range(num_layers + 1 - a)
    ]


def single(num_layers: int, action: str = SKIP) -> list[Configuration]:
    """Every layer by itself, and the whole model."""
    whole = [Configuration.of(num_layers, {})]
    return whole + [Configuration.of(num_layers, {action: [i]}) for i in range(num_layers)]


def blocks(num_layers: int, action: str = SKIP) -> list[Configuration]:
    """Every contiguous block of layers, and the whole model: L (L + 1) / 2 + 1."""
    whole = [Configuration.of(num_layers, {})]
    return whole + [
        Configuration.of(num_layers, {action: range(first, end)})
        for first in range(num_layers)
        for end in range(first + 1, num_layers + 1)
    ]


GENERATORS = {
    "input": input_direction,
    "output": output_direction,
    "grid": grid,
    "single": single,
    "blocks": blocks,
}


def configurations(what: str | Path | Iterable[Any], num_layers: int, action: str = SKIP) -> list[Configuration]:
    """Configurations from what a user writes.

    Args:
        what: a generator's name ("input", "output", "grid", "single", "blocks") or a JSON or YAML file that holds a
            list; several of them with commas between; or the list itself. An entry of a list is a generator's name, a
            `Configuration`, or a mapping from actions to layers, where "3-5" means layers 3, 4 and 5:
            {"skip": [0, 1, "28-29"], "skip_mlp": 7}; {} is the whole model.
        num_layers: decoder layers in the model, L.
        action: what the generators do to the layers they choose.

    Returns:
        The configurations in order, duplicates and all; see `distinct`.

    Raises:
        CogsymError: an unknown generator or action, a layer that there is not, a file that cannot be read.
    """
    if isinstance(what, (str, Path)):
        path = Path(what).expanduser()
        what = _read(path) if path.suffix in user_files.SUFFIXES and path.exists() else _words(str(what))
    chosen: list[Configuration] = []
    for entry in what:
        if isinstance(entry, Configuration):
            if len(entry.actions) != num_layers:
                raise CogsymError(
                    f"The configuration {entry.code} is for {len(entry.actions)} layers, expected {num_layers}, as "
                    "the model has."
                )
            chosen.append(entry)
        elif isinstance(entry, Mapping):
            changes = {act: [i for layer in _listed(layers) for i in _span(layer)] for act, layers in entry.items()}
            chosen.append(Configuration.of(num_layers, changes))
        elif entry in GENERATORS:
            chosen += GENERATORS[entry](num_layers, action)
        elif isinstance(entry, str) and entry in SEARCHES:
            raise CogsymError(
                f"The search {entry} stands beside other configurations, expected it alone; run it apart."
            )
        else:
            known = [*GENERATORS, "a .json or .yaml file with a list of them", *SEARCHES]
            raise unknown("set of configurations", entry, known)
    if not chosen:
        raise CogsymError("The list of configurations is empty, expected at least one; {} is the whole model.")
    return chosen


def distinct(chosen: Iterable[Configuration]) -> tuple[list[Configuration], int]:
    """(The configurations in order, each once; how many duplicates were merged)."""
    every = list(chosen)
    once = list(dict.fromkeys(every))
    return once, len(every) - len(once)


def _words(text: str) -> list[Any]:
    """Names, and what files among them hold."""
    entries: list[Any] = []
    for word in (word.strip() for word in text.split(",")):
        path = Path(word).expanduser()
        entries += _read(path) if path.suffix in user_files.SUFFIXES else [word]
    return entries


def _read(path: Path) -> list[Any]:
    entries = user_files.read(path)
    if not isinstance(entries, list):
        raise CogsymError(f"{path} holds a {type(entries).__name__}, expected a list of configurations.")
    return entries


def _listed(layers: Any) -> list[Any]:
    return layers if isinstance(layers, list) else [layers]


def _span(layer: Any) -> Iterable[Any]:
    """3 as [3] and "3-5" as [3, 4, 5]; what is no layer is left for `Configuration.of` to refuse."""
    if isinstance(layer, str):
        return parse_layers(layer)
    return layer if isinstance(layer, range) else [layer]
