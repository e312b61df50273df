"""The MLP of a decoder block.

    f(n) = Wd · (act(Wg n) · Wu n)      with a gate
    f(n) = Wd · act(Wu n)               without one

From the gradient of f, dz = df Wd; that of the products' outcome follows from dz and it; dn = that · W. z is never kept
and the down projection never repeated, unless a norm that follows it needs what it gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from cogsym import ops
from cogsym.models.half import Dial, Half, Kept, Product
from cogsym.models.inputs import LayerInputs
from cogsym.models.projections import Projections, compute_dtype
from cogsym.ops.activation import Activation


class Nonlinearity(Protocol):
    """What stands between the products.

    Attributes:
        operation: the name of what computes it.
    """

    operation: ClassVar[str]

    def modules(self) -> list[nn.Module]:
        """The model's modules that it stands for."""

    def __call__(self, *hidden: Tensor) -> Tensor:
        """z, [..., F], of the products' outcomes, [..., F] each."""

    def gradient(self, dz: Tensor, *hidden: Tensor) -> Tensor:
        """The gradient of the outcomes side by side, without autograd."""


@dataclass(frozen=True, eq=False)
class Gated:
    """act(gate) · up.

    Attributes:
        owner: the module with the activation.
        name: the activation's name in it.
        kind: which activation.
    """

    owner: Any
    name: str
    kind: Activation

    operation: ClassVar[str] = "gated_activation"

    def modules(self) -> list[nn.Module]:
        """See `Nonlinearity`."""
        return [getattr(self.owner, self.name)]

    def __call__(self, *hidden: Tensor) -> Tensor:
        """See `Nonlinearity`."""
        gate, up = hidden
        return ops.gated_activation(gate, up, self.kind)

    def gradient(self, dz: Tensor, *hidden: Tensor) -> Tensor:
        """See `Nonlinearity`."""
        gate, up = hidden
        return ops.gated_activation_gradients(dz, gate, up, self.kind)


@dataclass(frozen=True, eq=False)
class Pointwise:
    """act(x).

    Attributes:
        owner: the module with the activation.
        name: the activation's name in it.
        kind: which activation.
    """

    owner: Any
    name: str
    kind: Activation

    operation: ClassVar[str] = "gated_activation"  # which it is without a gate

    def modules(self) -> list[nn.Module]:
        """See `Nonlinearity`."""
        return [getattr(self.owner, self.name)]

    def __call__(self, *hidden: Tensor) -> Tensor:
        """See `Nonlinearity`."""
        (x,) = hidden
        return ops.activation(x, self.kind)

    def gradient(self, dz: Tensor, *hidden: Tensor) -> Tensor:
        """See `Nonlinearity`."""
        (x,) = hidden
        return ops.activation_gradient(dz, x, self.kind)


@dataclass(frozen=True, eq=False, kw_only=True)
class MlpHalf(Half):
    """An MLP on our operations.

    Attributes:
        up: gate and up, or up alone.
        down: the projection back (one name).
        nonlinearity: what stands between them.
    """

    up: Projections
    down: Projections
    nonlinearity: Nonlinearity

    def forward(self, n: Tensor, inputs: LayerInputs) -> Tensor:
        """See `Half`."""
        return self.down(self.nonlinearity(*self.up(n)))[0]

    def run(self, n: Tensor, inputs: LayerInputs, kept: Kept) -> Tensor:
        """See `Half`."""
        dtype = compute_dtype(n)
        kept["hidden"] = hidden = self.up.product(n, dtype)
        kept[self.PROJECTED] = projected = self.down.product(self.nonlinearity(*self._parts(hidden)), dtype)
        return projected

    def recall(self, n: Tensor, inputs: LayerInputs, kept: Kept, need_projected: bool) -> Tensor | None:
        """See `Half`."""
        if need_projected:
            return self.run(n, inputs, kept)
        kept["hidden"] = self.up.product(n, compute_dtype(n))
        return None

    def input_gradient(self, dprojected: Tensor, n: Callable[[], Tensor], inputs: LayerInputs, kept: Kept) -> Tensor:
        """See `Half`."""
        if "hidden" not in kept:
            self.recall(n(), inputs, kept, need_projected=False)
        hidden = kept.pop("hidden")  # the largest of them, and used up
        dz = self.down.input_gradient(dprojected.to(hidden.dtype))
        dhidden = self.nonlinearity.gradient(dz, *self._parts(hidden))
        del dz, hidden
        return self.up.input_gradient(dhidden)

    def kept(self, dial: Dial) -> tuple[str, ...]:
        """See `Half`."""
        projected = (self.PROJECTED,) if self.output_norm else ()
        return {"all": ("hidden", *projected), "attention": projected, "input": ()}[dial]

    def kept_bytes(self, dial: Dial, element_size: int) -> int:
        """See `Half`."""
        hidden = element_size * sum(self.up.sizes) if dial == "all" else 0
        return hidden + super().kept_bytes(dial, element_size)

    def products(self, rows: int) -> list[Product]:
        """See `Half`."""
        up, down = sum(self.up.sizes), self.up.sizes[-1]
        return [Product("up", rows, self.width, up, True), Product("down", rows, down, self.width, False)]

    def repeated(self, dial: Dial, need_projected: bool) -> set[str]:
        """See `Half`."""
        again = {"up"} if dial != "all" else set()
        return again | {"down"} if dial == "input" and (need_projected or self.output_norm) else again

    def projections(self) -> tuple[Projections, ...]:
        """See `Half`."""
        return self.up, self.down

    def operations(self) -> dict[str, dict[str, Any]]:
        """See `Half`."""
        return {self.nonlinearity.operation: {}}

    def bypassed(self) -> list[nn.Module]:
        """See `Half`."""
        return [self.module, *self.nonlinearity.modules()]

    @staticmethod
    def call_own(module: Any, n: Tensor, inputs: LayerInputs) -> Tensor:
        """See `Half`; mixtures of experts may return what they routed beside it."""
        y = module(n)
        return y[0] if isinstance(y, tuple) else y

    def _parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.split(self.up.sizes, dim=-1) if len(self.up.sizes) > 1 else (hidden,)
