"""Which Hugging Face decoder layers are read into a `Block`, and how: one file a family, or for a few near relations.

A family is known by its layer's class, never by a model's name: a subclass or a layer from remote code may compute
something else, and runs its own forward. `register_family` adds one; a package adds one by an entry point in the group
"cogsym.families" whose name is the layer's class and whose value is a `Family`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from cogsym.models.block import Block
from cogsym.models.guard import class_of, guarded, is_native
from cogsym.registry import Registry


class Logits(NamedTuple):
    """What a causal language model makes of the head's products.

    Attributes:
        scale: their factor.
        soft_cap: the bound behind it, or None.
    """

    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class Family:
    """One kind of decoder layer and the causal language model around it.

    Attributes:
        layer: the layer's class, with its module.
        causal_lm: the class of the model with `model` and `lm_head`, with its module.
        read: describes a layer as a `Block`; may raise `UnknownLayerError`.
        logits: of the model's config.
    """

    layer: str
    causal_lm: str
    read: Callable[[Any], Block]
    logits: Callable[[Any], Logits]


class UnknownLayerError(Exception):
    """A decoder layer runs its own forward; the message says why."""


FAMILIES: Registry[Family] = Registry("decoder layer", "cogsym.families")


def register_family(
    layer: str,
    read: Callable[[Any], Block],
    *,
    causal_lm: str | None = None,
    logits: Callable[[Any], Logits] = lambda config: Logits(),
) -> None:
    """Make a decoder layer known.

    Args:
        layer: its class, such as "transformers.models.llama.modeling_llama.LlamaDecoderLayer".
        read: describes one of its instances as a `Block` without copying a weight; `cogsym.models.families.pieces` has
            what most are made of. Raises `UnknownLayerError` where the layer must run its own forward.
        causal_lm: the class of the causal language model, whose logits are those of `lm_head` on what `model` gives,
            scaled and capped; by default the layer's with "ForCausalLM" for "DecoderLayer".
        logits: how they are scaled and capped, of the model's config.

    Raises:
        CogsymError: the layer is known already.
    """
    FAMILIES.register(
        layer, Family(layer, causal_lm or layer.removesuffix("DecoderLayer") + "ForCausalLM", read, logits)
    )


def read_block(layer: nn.Module, weights_follow: bool = False) -> Block:
    """Describe a decoder layer without copying a weight; what must run its own forward on it says why.

    Args:
        layer: the layer.
        weights_follow: it is on the meta device and only described; its weights are read before it runs.

    Raises:
        UnknownLayerError: all of the layer must run its own forward, with the reason.
    """
    cls = class_of(layer)
    if (path := _path(cls)) not in FAMILIES:
        raise UnknownLayerError(f"{cls.__qualname__} is not a decoder layer known to cogsym")
    if not is_native(cls):
        raise UnknownLayerError(f"the forward of {cls.__qualname__} is not the one that it was defined with")
    try:
        block = FAMILIES[path].read(layer)
    except AttributeError as error:  # a wrapper stands around a module, say
        raise UnknownLayerError(f"{cls.__qualname__} is not put together as its class does it: {error}") from error
    return guarded(block, weights_follow)


def logits_of(model: nn.Module) -> Logits | None:
    """What a causal language model makes of its head's products; None where it is not a known one."""
    path = _path(type(model))
    family = next((family for family in map(FAMILIES.__getitem__, FAMILIES) if family.causal_lm == path), None)
    return family.logits(model.config) if family and is_native(type(model)) else None


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")  # each registers its families
