"""Apertus: an MLP without a gate whose activation, xIELU, has two trained numbers; norms of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers.activations import XIELUActivation

from cogsym import ops
from cogsym.models.block import Block
from cogsym.models.families import register_family
from cogsym.models.families.pieces import attention, mlp, rms_norms


@dataclass(frozen=True, eq=False)
class XIELU:
    """The activation of `cogsym.ops.xielu`, its numbers kept positive by a softplus.

    Attributes:
        owner: the module with the activation.
        beta: β.
        eps: ε.
    """

    owner: Any
    beta: float
    eps: float

    operation: ClassVar[str] = "xielu"

    def modules(self) -> list[nn.Module]:
        """See `Nonlinearity`."""
        return [self.owner.act_fn]

    def __call__(self, *hidden: Tensor) -> Tensor:
        """See `Nonlinearity`."""
        (x,) = hidden
        return ops.xielu(x, *self._numbers())

    def gradient(self, dz: Tensor, *hidden: Tensor) -> Tensor:
        """See `Nonlinearity`."""
        (x,) = hidden
        return ops.xielu_input_gradient(dz, x, *self._numbers())

    def _numbers(self) -> tuple[Tensor, Tensor, float, float]:
        """α_p and α_n, which autograd follows to the module's parameters, β and ε."""
        module = self.owner.act_fn
        return softplus(module.alpha_p), self.beta + softplus(module.alpha_n), self.beta, self.eps


def _read(layer: Any) -> Block:
    make, module, activation = rms_norms(layer), layer.self_attn, layer.mlp.act_fn
    q_norm, k_norm = make(module, "q_norm"), make(module, "k_norm")
    known = None
    if type(activation) is XIELUActivation and not activation.beta.is_meta:
        known = XIELU(layer.mlp, float(activation.beta), float(activation.eps))
    return Block(
        attention(layer, make(layer, "attention_layernorm"), q_norm=q_norm, k_norm=k_norm),
        mlp(layer, make(layer, "feedforward_layernorm"), up=("up_proj",), gated=False, nonlinearity=known),
    )


register_family("transformers.models.apertus.modeling_apertus.ApertusDecoderLayer", _read)
