"""The norms of a decoder layer: on our operations where we know them, by their own module where we do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cogsym import ops


class Norm(Protocol):
    """A norm, read off the model at each call, so that a module that is replaced keeps working.

    Attributes:
        owner: the module that it is an attribute of.
        name: the attribute's name.
        module: the model's module.
    """

    @property
    def owner(self) -> Any:
        """See above."""

    @property
    def name(self) -> str:
        """See above."""

    @property
    def module(self) -> Any:
        """The module, as it is now."""

    def __call__(self, x: Tensor) -> Tensor:
        """x normalised, like x."""

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, sum)."""

    def input_gradient(self, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """The gradient for x, without autograd, with `dx`, which reaches it by another way, added."""


@dataclass(frozen=True, eq=False)
class KnownNorm:
    """A norm on our operations.

    Attributes:
        owner: the module that it is an attribute of.
        name: the attribute's name.
        offset: added to its weight: 1 for Gemma's and Nemotron's.
    """

    owner: Any
    name: str
    offset: float = 0.0

    @property
    def module(self) -> Any:
        """See `Norm`."""
        return getattr(self.owner, self.name)


class RMSNorm(KnownNorm):
    """A root-mean-square norm (`cogsym.ops.rms_norm`)."""

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        module = self.module
        return ops.rms_norm(x, module.weight, _eps(module), offset=self.offset)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Norm`."""
        module = self.module
        return ops.rms_norm(x, module.weight, _eps(module), residual=residual, offset=self.offset)

    def input_gradient(self, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """See `Norm`."""
        module = self.module
        return ops.rms_norm_input_gradient(dy, x, module.weight, _eps(module), offset=self.offset, dh=dx)


class LayerNorm(KnownNorm):
    """A layer norm, with or without a bias (`cogsym.ops.layer_norm`)."""

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        module = self.module
        return ops.layer_norm(x, module.weight, _bias(module), _eps(module), offset=self.offset)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Norm`."""
        module = self.module
        return ops.layer_norm(x, module.weight, _bias(module), _eps(module), residual=residual, offset=self.offset)

    def input_gradient(self, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """See `Norm`."""
        module = self.module
        return ops.layer_norm_input_gradient(dy, x, module.weight, _eps(module), offset=self.offset, dh=dx)


@dataclass(frozen=True, eq=False)
class ModuleNorm:
    """A norm that runs its module's own forward: hooks on it fire, and what it computes is its own affair.

    Attributes:
        owner: the module that it is an attribute of.
        name: the attribute's name.
        reason: why it does.
    """

    owner: Any
    name: str
    reason: str

    @property
    def module(self) -> Any:
        """See `Norm`."""
        return getattr(self.owner, self.name)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        y: Tensor = self.module(x)
        return y

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Norm`."""
        h = residual + x
        return self(h), h

    def input_gradient(self, dy: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
        """See `Norm`; the module is run again, under autograd."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = self(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, dy.to(y.dtype))
        return gradient if dx is None else gradient + dx


def _eps(module: Any) -> float:
    eps = getattr(module, "variance_epsilon", None)
    return module.eps if eps is None else eps


def _bias(module: Any) -> Tensor | None:
    return getattr(module, "bias", None)
