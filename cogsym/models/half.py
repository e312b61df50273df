"""A half of a decoder block: attention or MLP, and what it adds to the residual stream.

    added = c · norm'(f(norm(x)))

norm stands before f, norm' behind it, and c is a factor; each half has those of them that its family has. `f` is
`AttentionHalf`'s, `MlpHalf`'s, or that of a module which only runs its own forward (`OwnHalf`). A half computes in four
ways, all from the same few lines of arithmetic: under autograd (`forward`), without it and noting what its input
gradient needs (`run`), that gradient (`input_gradient`), and in place on the stream of a sweep (`add`).

What a half keeps for its input gradient is a dictionary of tensors; `kept` says which of them with which dial:

    "all"        everything the gradient needs
    "attention"  what lets attention's products of queries and keys not be repeated
    "input"      nothing besides the block's input
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cogsym.models.inputs import LayerInputs
from cogsym.models.norm import Norm
from cogsym.models.projections import Projections

Dial = Literal["all", "attention", "input"]
Kept = dict[str, Tensor]


class Product(NamedTuple):
    """A matrix product of a half, forward; its input gradient is one of the same size.

    Attributes:
        name: unique in the half.
        rows: of the left side, one a token.
        inputs: features of a row.
        outputs: features of a row of the outcome.
        reads_input: its input is made of the half's input without another product between.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    reads_input: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True, eq=False, kw_only=True)
class Half:
    """What both halves have.

    Attributes:
        owner: the module that the half's module is an attribute of. It is looked up at each call.
        name: the attribute's name.
        norm: before it, or None.
        output_norm: of what it adds to the stream, or None.
        residual_scale: factor of what it adds.
        width: D, features of the stream.
        reason: why it runs its own forward; empty where it does not.
    """

    owner: Any
    name: str
    norm: Norm | None
    output_norm: Norm | None = None
    residual_scale: float = 1.0
    width: int
    reason: str = ""

    PROJECTED: ClassVar[str] = "projected"  # the key of what the output norm normalises

    @property
    def module(self) -> Any:
        """The module, as it is now."""
        return getattr(self.owner, self.name)

    def normed(self, x: Tensor) -> Tensor:
        """What f takes, of the stream x."""
        return self.norm(x) if self.norm else x

    def contribution(self, projected: Tensor) -> Tensor:
        """What is added to the stream, from what f gives."""
        added = self.output_norm(projected) if self.output_norm else projected
        return added if self.residual_scale == 1 else added * self.residual_scale

    def projected_gradient(self, dy: Tensor, kept: Kept) -> Tensor:
        """The gradient of what f gives, from that of the stream."""
        gradient = dy if self.residual_scale == 1 else dy * self.residual_scale
        if self.output_norm is None:
            return gradient
        projected = kept[self.PROJECTED]
        return self.output_norm.input_gradient(gradient.to(projected.dtype), projected)  # autocast has them differ

    def add(self, x: Tensor, projected: Tensor) -> None:
        """Add what f gives to the stream x, in place."""
        added = self.output_norm(projected) if self.output_norm else projected
        x.add_(added, alpha=self.residual_scale)

    def forward(self, n: Tensor, inputs: LayerInputs) -> Tensor:
        """What f gives for n, [B, T, D] each, under autograd: gradients of all that needs one follow from it."""
        raise NotImplementedError

    def run(self, n: Tensor, inputs: LayerInputs, kept: Kept) -> Tensor:
        """As `forward`, without autograd; what the gradient needs goes into `kept`."""
        raise NotImplementedError

    def recall(self, n: Tensor, inputs: LayerInputs, kept: Kept, need_projected: bool) -> Tensor | None:
        """Compute again, for the gradient, what "input" did not keep.

        Args:
            n: as in `run`.
            inputs: as in `run`.
            kept: filled.
            need_projected: whether what f gives is wanted; else None may be returned.
        """
        return self.run(n, inputs, kept)

    def input_gradient(self, dprojected: Tensor, n: Callable[[], Tensor], inputs: LayerInputs, kept: Kept) -> Tensor:
        """The gradient of n, without autograd.

        Args:
            dprojected: the gradient of what f gives.
            n: gives n, where something has to be computed again.
            inputs: as in `run`.
            kept: as `run` or `recall` left it; used up.
        """
        raise NotImplementedError

    def lacks(self, kept: Kept) -> bool:
        """Whether `recall` must come before `projected_gradient` and `input_gradient`."""
        return self.output_norm is not None and self.PROJECTED not in kept

    def kept(self, dial: Dial) -> tuple[str, ...]:
        """Which keys of `kept` a dial keeps."""
        raise NotImplementedError

    def kept_bytes(self, dial: Dial, element_size: int) -> int:
        """Bytes that they take for a token, where an element of the products takes `element_size`."""
        return element_size * self.width if self.output_norm and dial != "input" else 0

    def products(self, rows: int) -> list[Product]:
        """The matrix products by weights, in order; none where they are not known."""
        return []

    def mixing_flops(self, length: int) -> int:
        """Multiplications and additions between tokens, for a row of `length`; the gradient takes 5/2 of it."""
        return 0

    def repeated(self, dial: Dial, need_projected: bool) -> set[str]:
        """Names of products, and "mixing", that are computed again for the gradient.

        Args:
            dial: what is kept.
            need_projected: whether the block needs what f gives once more, where it was not kept.
        """
        return set()

    def projections(self) -> tuple[Projections, ...]:
        """The linear maps that are computed here, in order."""
        return ()

    def operations(self) -> dict[str, dict[str, Any]]:
        """Names of the operations that f takes, with what decides where they run, as `cogsym.ops.route` has it."""
        return {}

    def bypassed(self) -> list[nn.Module]:
        """Modules whose own forward f does not call, so that nothing that waits on it would fire."""
        return []

    def on_own_forward(self, reason: str) -> OwnHalf:
        """This half, f run by the model's own module."""
        return OwnHalf(
            owner=self.owner, name=self.name, norm=self.norm, output_norm=self.output_norm,
            residual_scale=self.residual_scale, width=self.width, reason=reason, call=self.call_own,
        )  # fmt: skip

    @staticmethod
    def call_own(module: Any, n: Tensor, inputs: LayerInputs) -> Tensor:
        """What the module's own forward gives for n, called as transformers' layers do."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnHalf(Half):
    """A half whose module runs its own forward; where it is frozen it is run again rather than kept.

    Attributes:
        call: (module, n, inputs) -> what f gives.
    """

    call: Callable[[Any, Tensor, LayerInputs], Tensor]

    def forward(self, n: Tensor, inputs: LayerInputs) -> Tensor:
        """See `Half`."""
        return self.call(self.module, n, inputs)

    def run(self, n: Tensor, inputs: LayerInputs, kept: Kept) -> Tensor:
        """See `Half`."""
        kept[self.PROJECTED] = projected = self.call(self.module, n, inputs)
        return projected

    def recall(self, n: Tensor, inputs: LayerInputs, kept: Kept, need_projected: bool) -> Tensor:
        """See `Half`: with the graph, so that the gradient need not run it once more."""
        with torch.enable_grad():
            kept["leaf"] = leaf = n.detach().requires_grad_()
            kept["graph"] = projected = self.call(self.module, leaf, inputs)
        kept[self.PROJECTED] = projected.detach()
        return kept[self.PROJECTED]

    def input_gradient(self, dprojected: Tensor, n: Callable[[], Tensor], inputs: LayerInputs, kept: Kept) -> Tensor:
        """See `Half`."""
        if "graph" not in kept:
            self.recall(n(), inputs, kept, need_projected=False)
        projected, leaf = kept.pop("graph"), kept.pop("leaf")
        (gradient,) = torch.autograd.grad(projected, leaf, dprojected.to(projected.dtype))
        return gradient

    def kept(self, dial: Dial) -> tuple[str, ...]:
        """See `Half`."""
        return (self.PROJECTED,) if self.output_norm and dial != "input" else ()

    def on_own_forward(self, reason: str) -> OwnHalf:
        """See `Half`: it is."""
        return self

    def draws(self) -> bool:
        """Whether its forward draws at random in training, so that running it again gives something else."""
        module = self.module
        rates = ("attention_dropout", "jitter_noise", "router_jitter_noise", "dropout_prob")
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())
        return drops or any(_rate(getattr(module, name, 0.0)) > 0 for name in rates)


def _rate(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
