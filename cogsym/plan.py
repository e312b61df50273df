"""Which parts of a model are trained: the CogSym recipe's outer layers, or any other choice of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from cogsym.errors import CogsymError


@dataclass(frozen=True)
class Part:
    """A part of a decoder model, as a plan sees it.

    Attributes:
        name: "embeddings", "layer 0" ..., "final norm", "head" or "other".
        parameters: its parameters; a head tied to the embeddings has none of its own.
        trained: whether the plan trains it.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    trained: bool

    @property
    def num_parameters(self) -> int:
        """Elements in all its parameters."""
        return sum(p.numel() for p in self.parameters)


@dataclass(frozen=True)
class LayerPlan:
    """Which decoder layers are trained, and whether embeddings, final norm and head are.

    Build one with `outer`, `first`, `last`, `layers` or `all`.

        >>> print(LayerPlan.outer(30))
        train layers 0-3 and 26-29 (8 of 30); freeze layers 4-25, embeddings, final norm, head

    Attributes:
        num_layers: decoder layers in the model, L.
        trained: indices of the trained layers, ascending, 0 next to the embeddings.
        embeddings: whether the input embeddings are trained.
        head: whether the output head is trained.
        final_norm: whether the norm before the head is trained.
    """

    num_layers: int
    trained: tuple[int, ...]
    embeddings: bool = False
    head: bool = False
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise CogsymError(f"The plan is for {self.num_layers} layers, expected at least 1.")
        if wrong := [i for i in self.trained if not 0 <= i < self.num_layers]:
            raise CogsymError(
                f"The plan trains layer {wrong[0]}, expected indices from 0 to {self.num_layers - 1} "
                f"for a model of {self.num_layers} layers."
            )
        object.__setattr__(self, "trained", tuple(sorted(set(self.trained))))
        if not (self.trained or self.embeddings or self.head or self.final_norm):
            raise CogsymError("The plan trains nothing; choose at least one layer, or embeddings, head or final norm.")

    @classmethod
    def outer(
        cls,
        num_layers: int,
        fraction: float = 0.25,
        front: int | None = None,
        back: int | None = None,
        embeddings: bool = False,
        head: bool = False,
        final_norm: bool = False,
    ) -> LayerPlan:
        """The outermost layers: a few first, a few last, the middle frozen.

        The number of trained layers is `fraction` of L rounded to the nearest whole number, a half rounded up, and at
        least one at each end (L >= 2). It is split evenly; of an odd number the front has one more. L = 30 trains
        4 + 4, L = 32 also 4 + 4, L = 28 trains 4 + 3, L = 2 trains both.

        Args:
            num_layers: decoder layers in the model, L.
            fraction: share of the layers to train, in (0, 1].
            front: how many of the first layers, instead of the even split.
            back: how many of the last layers. One of the two given alone leaves the rest of `fraction` to the other.
            embeddings: train the input embeddings too.
            head: train the output head too.
            final_norm: train the norm before the head too.

        Raises:
            CogsymError: a fraction outside (0, 1], or more layers than there are.
        """
        if not 0 < fraction <= 1:
            raise CogsymError(
                f"The fraction of layers to train is {fraction}, expected more than 0 and at most 1, such as 0.25."
            )
        count = min(num_layers, max(2, math.floor(fraction * num_layers + 0.5)))
        if front is None and back is None:
            front = (count + 1) // 2
        if front is None:
            front = max(count - (back or 0), 0)
        if back is None:
            back = max(count - front, 0)
        if min(front, back) < 0 or front + back > num_layers:
            raise CogsymError(
                f"The plan trains {front} first and {back} last layers, expected both at least 0 and together at most "
                f"the model's {num_layers}."
            )
        trained = (*range(front), *range(num_layers - back, num_layers))
        return cls(num_layers, trained, embeddings, head, final_norm)

    @classmethod
    def first(cls, num_layers: int, k: int, **parts: bool) -> LayerPlan:
        """The k layers next to the embeddings; `parts` as in `outer`."""
        return cls.outer(num_layers, 1, k, 0, **parts)

    @classmethod
    def last(cls, num_layers: int, k: int, **parts: bool) -> LayerPlan:
        """The k layers next to the head; `parts` as in `outer`."""
        return cls.outer(num_layers, 1, 0, k, **parts)

    @classmethod
    def layers(cls, num_layers: int, indices: Iterable[int], **parts: bool) -> LayerPlan:
        """Exactly these layers; `parts` as in `outer`."""
        return cls(num_layers, tuple(indices), **parts)

    @classmethod
    def all(cls, num_layers: int) -> LayerPlan:
        """Everything: full fine-tuning, with embeddings, head and final norm."""
        return cls(num_layers, tuple(range(num_layers)), True, True, True)

    def __str__(self) -> str:
        rest = [i for i in range(self.num_layers) if i not in self.trained]
        parts = {"embeddings": self.embeddings, "final norm": self.final_norm, "head": self.head}
        trained = [f"{_ranges(self.trained)} ({len(self.trained)} of {self.num_layers})"] if self.trained else []
        frozen = [_ranges(rest)] if rest else []
        trained += [name for name, on in parts.items() if on]
        frozen += [name for name, on in parts.items() if not on]
        return f"train {', '.join(trained)}; freeze {', '.join(frozen) or 'nothing'}"

    def parts(self, model: nn.Module) -> list[Part]:
        """The parts of a Hugging Face decoder model in order, each trained or not by this plan.

        Raises:
            CogsymError: the model has another number of layers, or ties its head to its embeddings and the plan
                trains only one of them.
        """
        decoder = model.get_decoder()  # type: ignore[operator]
        layers = decoder.layers
        if len(layers) != self.num_layers:
            raise CogsymError(
                f"The plan is for {self.num_layers} layers and the model has {len(layers)}; "
                f"make the plan with num_layers={len(layers)}."
            )
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        if head is not None and _tied(embeddings, head) and self.embeddings != self.head:
            raise CogsymError(
                "The model ties its head to its embeddings, one weight for both, but the plan trains only "
                f"{'the embeddings' if self.embeddings else 'the head'}; set embeddings and head alike."
            )
        modules = [("embeddings", embeddings, self.embeddings)]
        modules += [(f"layer {i}", layer, i in self.trained) for i, layer in enumerate(layers)]
        modules += [("final norm", getattr(decoder, "norm", None), self.final_norm), ("head", head, self.head)]
        seen: set[int] = set()
        parts = [Part(name, _unseen(module, seen), on) for name, module, on in modules if module is not None]
        if other := _unseen(model, seen):
            parts.append(Part("other", other, False))
        return parts

    def describe(self, model: nn.Module) -> str:
        """What the plan trains in `model`, with parameter counts; a few lines to print."""
        parts = self.parts(model)
        total = sum(p.num_parameters for p in parts)
        trained = sum(p.num_parameters for p in parts if p.trained)
        lines = [str(self)]
        for on, word in ((True, "trained"), (False, "frozen")):
            chosen = [p for p in parts if p.trained is on and p.num_parameters]
            layers = [p for p in chosen if p.name.startswith("layer ")]
            counts = [(f"{len(layers)} layers", sum(p.num_parameters for p in layers))] if layers else []
            counts += [(p.name, p.num_parameters) for p in chosen if p not in layers]
            share = trained if on else total - trained
            detail = ", ".join(f"{name} {number:,}" for name, number in counts)
            lines.append(
                f"{word}: {share:,} parameters ({share / total:.1%}) {f'- {detail}' if detail else ''}".rstrip()
            )
        return "\n".join(lines)


def _tied(embeddings: nn.Module, head: nn.Module) -> bool:
    return getattr(head, "weight", None) is getattr(embeddings, "weight", None)


def _unseen(module: nn.Module, seen: set[int]) -> tuple[nn.Parameter, ...]:
    """The module's parameters that no earlier part had, so that a shared one counts once."""
    new = tuple(p for p in module.parameters() if id(p) not in seen)
    seen.update(id(p) for p in new)
    return new


def _ranges(indices: Iterable[int]) -> str:
    """0, 1, 2, 5 as "layers 0-2 and 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    head, last = ", ".join(words[:-1]), words[-1]
    return f"layers {head} and {last}" if head else f"layer{'s' * (runs[0][0] != runs[0][1])} {last}"
