"""Which parts of a model are trained: the CogSym recipe's outer layers, or any other choice of layers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from cogsym import strategies
from cogsym.decoder import LAYER_NAMES, before_layers_of, final_norm_of, layers_of
from cogsym.errors import CogsymError

Config = TypeVar("Config")


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

    Build one with `outer`, `first`, `last`, `layers` or `all`, or with `choose` by any strategy of
    `cogsym.strategies`; all but `all` take the last three attributes as keywords.

        >>> print(LayerPlan.outer(30))
        train layers 0-3 and 26-29 (8 of 30); freeze layers 4-25, embeddings, final norm, head

    Attributes:
        num_layers: decoder layers in the model, L.
        trained: indices of the trained layers, ascending, 0 next to the embeddings.
        embeddings: whether the input embeddings are trained, with all else before the layers (learned positions).
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
        for i in self.trained:
            if not hasattr(i, "__index__") or not 0 <= i < self.num_layers:
                raise CogsymError(
                    f"The plan trains layer {i}, expected indices from 0 to {self.num_layers - 1} for a model of "
                    f"{self.num_layers} layers."
                )
        object.__setattr__(self, "trained", tuple(sorted(set(map(operator.index, self.trained)))))
        if not (self.trained or self.embeddings or self.head or self.final_norm):
            raise CogsymError("The plan trains nothing; choose at least one layer, or embeddings, head or final norm.")

    @classmethod
    def choose(
        cls, num_layers: int, strategy: str = "outer", options: Mapping[str, Any] | None = None, **parts: bool
    ) -> LayerPlan:
        """The layers that a strategy of `cogsym.strategies`, or of another package, chooses.

        Args:
            num_layers: decoder layers in the model, L.
            strategy: its name.
            options: its options.
            parts: embeddings, head, final_norm.

        Raises:
            CogsymError: an unknown strategy or option, or layers that there are not.
        """
        return cls(num_layers, tuple(strategies.choose_layers(strategy, num_layers, options or {})), **parts)

    @classmethod
    def outer(
        cls,
        num_layers: int,
        fraction: float | None = None,
        front: int | None = None,
        back: int | None = None,
        **parts: bool,
    ) -> LayerPlan:
        """The outermost layers, a quarter by default, as `cogsym.strategies.outer` says; the middle frozen."""
        return cls(num_layers, tuple(strategies.outer(num_layers, fraction, front, back)), **parts)

    @classmethod
    def first(cls, num_layers: int, k: int, **parts: bool) -> LayerPlan:
        """The k layers next to the embeddings."""
        return cls(num_layers, tuple(strategies.first(num_layers, k)), **parts)

    @classmethod
    def last(cls, num_layers: int, k: int, **parts: bool) -> LayerPlan:
        """The k layers next to the head."""
        return cls(num_layers, tuple(strategies.last(num_layers, k)), **parts)

    @classmethod
    def layers(cls, num_layers: int, indices: str | Iterable[int], **parts: bool) -> LayerPlan:
        """Exactly these layers, as numbers or as text such as "0-3,26-29"."""
        return cls(num_layers, tuple(strategies.layers(num_layers, indices)), **parts)

    @classmethod
    def all(cls, num_layers: int) -> LayerPlan:
        """Everything: full fine-tuning, with embeddings, head and final norm."""
        return cls(num_layers, tuple(range(num_layers)), True, True, True)

    def __str__(self) -> str:
        rest = [i for i in range(self.num_layers) if i not in self.trained]
        parts = {"embeddings": self.embeddings, "final norm": self.final_norm, "head": self.head}
        trained = [f"{_named(self.trained)} ({len(self.trained)} of {self.num_layers})"] if self.trained else []
        frozen = [_named(rest)] if rest else []
        trained += [name for name, on in parts.items() if on]
        frozen += [name for name, on in parts.items() if not on]
        return f"train {', '.join(trained)}; freeze {', '.join(frozen) or 'nothing'}"

    def parts(self, model: nn.Module) -> list[Part]:
        """The parts of a Hugging Face decoder model in order, each trained or not by this plan.

        Raises:
            CogsymError: the model has no decoder layers, or another number of them; or the plan trains one of two parts
                that share weights, such as a head tied to the embeddings.
        """
        layers, norm = layers_of(model), final_norm_of(model)
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
        owners: dict[int, int] = {}
        for i, layer in enumerate(layers):
            for first in (owners.setdefault(id(p), i) for p in layer.parameters()):
                if (i in self.trained) != (first in self.trained):
                    raise CogsymError(
                        f"Layers {first} and {i} of the model share weights, but the plan trains only layer "
                        f"{i if i in self.trained else first}; train both or neither."
                    )
        before: nn.Module = nn.ModuleList([embeddings, *before_layers_of(model)])
        modules: list[tuple[str, nn.Module | None, bool]] = [("embeddings", before, self.embeddings)]
        modules += [(f"layer {i}", layer, i in self.trained) for i, layer in enumerate(layers)]
        modules += [("final norm", norm and norm[1], self.final_norm), ("head", head, self.head)]
        seen: set[int] = set()
        parts = [Part(name, _unseen(module, seen), on) for name, module, on in modules if module is not None]
        if other := _unseen(model, seen):
            parts.append(Part("other", other, False))
        return parts

    def peft_config(self, config: Config) -> Config:
        """A copy of a configuration of peft, such as `LoraConfig`, that puts adapters on the trained layers alone.

            >>> get_peft_model(model, plan.peft_config(LoraConfig(r=16, target_modules=["q_proj", "v_proj"])))

        Args:
            config: with `target_modules` as a list of names, or None for those that peft chooses.

        Raises:
            CogsymError: the plan trains something beside layers; or adapters of this kind cannot be told which layers
                they are for.
        """
        if self.embeddings or self.head or self.final_norm:
            raise CogsymError("LoRA trains decoder layers only; leave embeddings, head and final norm out of the plan.")
        kind, targets = type(config).__name__, getattr(config, "target_modules", None)
        if not hasattr(config, "layers_to_transform"):
            raise CogsymError(
                f"{kind} has no layers_to_transform, as its adapters are not those of single layers; give it to peft "
                "as it is, or take one that has, such as LoraConfig."
            )
        if isinstance(targets, str):
            raise CogsymError(
                f"The target_modules of {kind} are {targets!r}, expected a list of names, which alone peft limits to "
                "layers; name them, such as ['q_proj', 'v_proj']."
            )
        limited: Any = copy.copy(config)
        limited.layers_to_transform, limited.layers_pattern = list(self.trained), list(LAYER_NAMES)
        chosen: Config = limited
        return chosen

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


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {strategies.format_layers(layers)}"
