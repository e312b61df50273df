"""What must run its own forward, and why: the rule that training, sweeps and `explain` share.

Our operations stand in for modules of transformers whose arithmetic we know. A module computes what we think only if

    its class is the one that its family has, and the class's forward the one it was defined with (Liger and others
        replace it)
    it has no forward of its own as an instance (accelerate's offloading, TRL and others set one)
    nothing waits on it: no forward or backward hook
    its weights are there: none on the meta device

Where one of them does not hold, the half or the norm that the module belongs to runs its own forward instead.

All of this is read once, and again when something changed: `Watch` compares what can change with what it was. A change
it does not see is one that leaves every submodule, parameter, hook, `requires_grad`, instance forward and class forward
of the layer as it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cogsym.models.attachment import foreign_forward
from cogsym.models.block import Block
from cogsym.models.half import Half, OwnHalf
from cogsym.models.hooks import HOOKS, hook_on
from cogsym.models.norm import ModuleNorm, Norm

_LIBRARIES = tuple(f"{Path(library.__file__).parent}/" for library in (transformers, torch) if library.__file__)


def guarded(block: Block, weights_follow: bool = False) -> Block:
    """The block with what must run its own forward on it; weights may be absent that are read before it runs."""
    norms: dict[int, Norm] = {}  # a norm that both halves read stays one

    def norm_of(norm: Norm | None) -> Norm | None:
        if norm is None or isinstance(norm, ModuleNorm):
            return norm
        reason = why_own(norm.module, weights_follow)
        return norms.setdefault(id(norm), ModuleNorm(norm.owner, norm.name, reason) if reason else norm)

    def half_of(half: Half) -> Half:
        half = replace(half, norm=norm_of(half.norm), output_norm=norm_of(half.output_norm))
        if isinstance(half, OwnHalf):
            return half
        reason = next(filter(None, (why_own(module, weights_follow) for module in half.bypassed())), None)
        return half.on_own_forward(reason) if reason else half

    return replace(block, attention=half_of(block.attention), mlp=half_of(block.mlp))


def why_own(module: Any, weights_follow: bool = False) -> str | None:
    """Why a module that our operations stand in for must run its own forward, or None; see `guarded`."""
    name = type(module).__name__
    if foreign_forward(module):
        return f"another library has replaced the forward of {name}"
    if not is_native(type(module)):
        return f"the forward of {name} is not the one that it was defined with"
    if hook_on(module):
        return f"a hook on {name} must fire"
    if not weights_follow and any(p.is_meta for p in module.parameters(recurse=False)):
        return f"the weights of {name} are not in memory"
    return None


def is_native(cls: type) -> bool:
    """Whether a class's forward is the one it was defined with: decorators included, all of it lies in transformers,
    in torch, or in the class's own file."""
    own = getattr(sys.modules.get(cls.__module__), "__file__", None)
    function: Any = cls.forward  # type: ignore[attr-defined]
    while function is not None:
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        if file != own and not file.startswith(_LIBRARIES):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def class_of(layer: nn.Module) -> type:
    """The class of a layer as transformers made it: FSDP2 puts one of its own before it."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, FSDPModule))


class Watch:
    """Notices whether anything of a layer changed that decides how it runs."""

    def __init__(self, layer: nn.Module) -> None:
        """Remember the layer as it is."""
        self._modules = list(layer.modules())
        attributes = [vars(module) for module in self._modules]
        self._attributes = attributes
        self._children = [d["_modules"] for d in attributes if d["_modules"]]
        self._owned = [d["_parameters"] for d in attributes if d["_parameters"]]
        self._hooks = [d[name] for d in attributes for name in HOOKS]
        self._parameters = list(layer.parameters())  # held, so that no other takes the place of one in memory
        self._state = self._read()

    def changed(self) -> bool:
        """Whether it is no more as it was."""
        return self._read() != self._state

    def _read(self) -> list[Any]:
        classes: list[Any] = list(map(type, self._modules))
        state: list[Any] = [cls.forward for cls in dict.fromkeys(classes)]
        state += classes
        state += [id(d["forward"]) if "forward" in d else 0 for d in self._attributes]
        for children in self._children:
            state += map(id, children.values())
        for parameters in self._owned:
            for p in parameters.values():
                if p is not None:
                    state += (id(p), p.requires_grad)
        if any(self._hooks):
            for hooks in self._hooks:
                state += hooks
        return state
