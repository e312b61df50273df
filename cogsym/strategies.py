"""Which layers: lists of them as people write them, and the strategies that choose them.

A strategy is a function of the number of decoder layers, L, and of options of its own, which gives the indices of the
chosen layers, 0 next to the embeddings. Another package adds one by `register_strategy`, or without being imported by
an entry point:

    [project.entry-points."cogsym.strategies"]
    every = "my_package:every"  # def every(num_layers: int, step: int = 2) -> Iterable[int]

It is then `LayerPlan.choose(32, "every", {"step": 3})` in Python and `cogsym train --layers every,step=3` in a shell.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from cogsym.errors import CogsymError
from cogsym.registry import Registry

Strategy = Callable[..., Iterable[int]]


def choose_layers(name: str, num_layers: int, options: Mapping[str, Any]) -> Iterable[int]:
    """The layers that a strategy chooses.

    Args:
        name: the strategy's.
        num_layers: decoder layers in the model, L.
        options: the strategy's.

    Raises:
        CogsymError: an unknown strategy or option, or one that is missing or out of its range.
    """
    strategy = STRATEGIES[name]
    signature = inspect.signature(strategy)
    try:
        signature.bind(num_layers, **options)
    except TypeError as error:
        known = ", ".join([*signature.parameters][1:]) or "none"
        raise CogsymError(
            f"The options of the layer strategy {name!r} are wrong ({error}), expected: {known}."
        ) from None
    chosen = strategy(num_layers, **options)
    if not isinstance(chosen, Iterable):
        raise CogsymError(f"The layer strategy {name!r} chooses {chosen!r}, expected a list of layers.")
    return chosen


def register_strategy(name: str, strategy: Strategy) -> None:
    """Add a layer strategy.

    Args:
        name: a word.
        strategy: a function of num_layers and options that gives the indices of the chosen layers.

    Raises:
        CogsymError: there is one of this name, or it is not a word.
    """
    STRATEGIES.register(name, strategy)


def parse_strategy(text: str) -> tuple[str, dict[str, Any]]:
    """A strategy and its options from text.

    Args:
        text: a list of layers, "0-3,26-29", or a strategy's name and options, "first,k=4".

    Raises:
        CogsymError: it is neither.
    """
    name, *settings = text.strip().split(",")
    if not re.match("[A-Za-z_]", name):
        return "layers", {"indices": text}
    options = {}
    for setting in settings:
        option, found, value = setting.partition("=")
        try:
            options[option.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            found = ""
        if not found:
            raise CogsymError(
                f"The choice of layers {text!r} is not understood at {setting!r}; give a list such as 0-3,26-29, or a "
                "strategy with its options, such as first,k=4."
            )
    return name.strip(), options


def parse_layers(text: str) -> list[int]:
    """ "0-3,26-29" as [0, 1, 2, 3, 26, 27, 28, 29].

    Raises:
        CogsymError: anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)  # no model has a million
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise CogsymError(
                f"The list of layers {text!r} is not understood at {part!r}; give numbers and ranges with commas "
                "between, such as 0-3,26-29."
            )
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def format_layers(layers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2 and 5"."""
    runs: list[list[int]] = []
    for i in sorted(set(layers)):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def outer(
    num_layers: int, fraction: float | None = None, front: int | None = None, back: int | None = None
) -> Iterable[int]:
    """The outermost layers: a few first, a few last.

    Their number is `fraction` of L rounded to the nearest whole number, a half rounded up, and at least one at each end
    (L >= 2). It is split evenly; of an odd number the front has one more. L = 30 has 4 + 4, L = 32 also 4 + 4, L = 28
    has 4 + 3, L = 2 both.

    Args:
        num_layers: decoder layers in the model, L.
        fraction: share of the layers, in (0, 1]; a quarter by default.
        front: how many of the first layers, instead of the even split.
        back: how many of the last layers. One of the two given alone leaves the rest of `fraction` to the other.

    Raises:
        CogsymError: a fraction outside (0, 1], one beside both `front` and `back`, or more layers than there are.
    """
    if front is not None and back is not None:
        if fraction is not None:
            raise CogsymError(
                f"The fraction of layers to train is {fraction} beside {front} first and {back} last layers, which "
                "leave it nothing to say; give at most two of the three."
            )
        return _ends(num_layers, front, back)
    fraction = 0.25 if fraction is None else fraction
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise CogsymError(
            f"The fraction of layers to train is {fraction}, expected more than 0 and at most 1, such as 0.25."
        )
    count = min(num_layers, max(2, math.floor(fraction * num_layers + 0.5)))
    if front is None and back is None:
        return _ends(num_layers, (count + 1) // 2, count // 2)
    if front is None:
        return _ends(num_layers, max(count - _whole(back), 0), back)
    return _ends(num_layers, front, max(count - _whole(front), 0))


def first(num_layers: int, k: int) -> Iterable[int]:
    """The k layers next to the embeddings."""
    return _ends(num_layers, k, 0)


def last(num_layers: int, k: int) -> Iterable[int]:
    """The k layers next to the head."""
    return _ends(num_layers, 0, k)


def layers(num_layers: int, indices: str | Iterable[int]) -> Iterable[int]:
    """Exactly these layers, as numbers or as text such as "0-3,26-29"."""
    return parse_layers(indices) if isinstance(indices, str) else indices


def every(num_layers: int) -> Iterable[int]:
    """All layers."""
    return range(num_layers)


def _ends(num_layers: int, front: Any, back: Any) -> Iterable[int]:
    if min(_whole(front), _whole(back)) < 0 or front + back > num_layers:
        raise CogsymError(
            f"The plan trains {front} first and {back} last layers, expected both at least 0 and together at most "
            f"the model's {num_layers}."
        )
    return (*range(front), *range(num_layers - back, num_layers))


def _whole(count: Any) -> int:
    if not isinstance(count, int):
        raise CogsymError(f"The number of layers is {count!r}, expected a whole number.")
    return count


def _check(name: str, strategy: Strategy) -> None:
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name) or not callable(strategy):
        raise CogsymError(
            f"The layer strategy {name!r} is {strategy!r}, expected a word and a function of the number of layers."
        )


STRATEGIES = Registry[Strategy]("layer strategy", "cogsym.strategies", _check)
_BUILT_IN: dict[str, Strategy] = {"outer": outer, "first": first, "last": last, "layers": layers, "all": every}
for _name, _strategy in _BUILT_IN.items():
    register_strategy(_name, _strategy)
