"""Linear maps of one input, and how their weights lie in memory.

Queries, keys and values are three products of one input, gate and up two. Where none of their weights changes any more
they can be one: their rows are laid beside each other in one storage, of which each parameter stays a view. Nothing
else is kept, no weight is held twice, and `state_dict` does not change; whether weights lie so is read off them at each
call, so that sharding the model merely makes the products several again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from cogsym import ops
from cogsym.models.attachment import foreign_forward
from cogsym.models.hooks import hook_on

SCALE = "weight_scale"  # the buffer of a linear module with the scales of its rows, where its weight is int8

# Up to so many rows oneDNN's own layout of the weights pays: the time is that of reading them.
_PACKED_ROWS = 512


@dataclass(frozen=True, eq=False)
class Projections:
    """Linear modules of one input, or one module whose output holds theirs side by side.

    Attributes:
        owner: the module they are attributes of. They are looked up at each call: peft replaces them.
        names: the attributes' names.
        sizes: features of each output; more than there are names where one module holds them all.
    """

    owner: Any
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    _packed: list[Tensor] = field(default_factory=list, init=False, repr=False)  # none, or all weights as one

    @property
    def modules(self) -> list[Any]:
        """The modules, as they are now."""
        # Submodules are not among an object's plain attributes, and asking for them as such is slow.
        modules = vars(self.owner)["_modules"]
        return [modules[name] for name in self.names]

    def __call__(self, x: Tensor, outputs: slice = slice(None)) -> tuple[Tensor, ...]:
        """The outputs, [..., size] each: by their modules under autograd and where they are more than linear maps of
        their own, else by one product.

        Args:
            x: [..., features].
            outputs: which of the outputs, such as slice(1, 3) for keys and values.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.plain():
            made = [module(x) for module in self.modules[outputs if self._apart else slice(None)]]
            return tuple(made) if self._apart else made[0].split(self.sizes, dim=-1)[outputs]
        product, sizes = self.product(x, compute_dtype(x), outputs), self.sizes[outputs]
        return (product,) if len(sizes) == 1 else product.split(sizes, dim=-1)

    def plain(self) -> bool:
        """Whether the modules are `nn.Linear` and nothing more: no adapter, no quantised weight, no sharded one, no
        forward of its own, no hook."""
        for module in self.modules:
            if type(module) is not nn.Linear:
                return False
            attributes = vars(module)
            weight = attributes["_parameters"]["weight"]
            if type(weight) is not nn.Parameter or weight.is_meta or hook_on(module):
                return False
            if "forward" in attributes and foreign_forward(module):
                return False
        return True

    @property
    def _apart(self) -> bool:
        """Whether each output has a module."""
        return len(self.names) == len(self.sizes)

    def product(self, x: Tensor, dtype: torch.dtype, outputs: slice = slice(None)) -> Tensor:
        """The outputs side by side, [..., Σ sizes] of `dtype`, computed from the weights themselves.

        Args:
            x: [..., features].
            dtype: what the input is cast to, and weights of wider types.
            outputs: which of the outputs, such as slice(1, 3) for keys and values.
        """
        weights, biases, scales = self._parameters()
        x = x.to(dtype)
        if self._packed and outputs == slice(None) and x.numel() <= _PACKED_ROWS * x.shape[-1]:
            bias = None if biases is None else torch.cat(biases).to(dtype)
            return packed_linear(x, self._packed[0], bias)
        weight = _joined(weights)
        if weight is not None:
            ends = [0, *accumulate(self.sizes)]
            chosen = range(len(self.sizes))[outputs]
            rows = slice(ends[chosen.start], ends[chosen.stop])
            bias = None if biases is None else torch.cat(biases)[rows]
            return _linear(x, weight[rows], None if scales[0] is None else torch.cat(scales)[rows], bias)
        weights, scales, biases = weights[outputs], scales[outputs], biases and biases[outputs]
        pieces = zip(weights, scales, biases or [None] * len(weights), strict=True)
        return torch.cat([_linear(x, *piece) for piece in pieces], dim=-1)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """The gradient of `product` for its input, in the dtype of `dy`, [..., Σ sizes]."""
        weights, _, scales = self._parameters()
        weight = _joined(weights)
        if weight is not None:
            return _input_gradient(dy, weight, None if scales[0] is None else torch.cat(scales))
        pieces = zip(dy.split(self._rows(), -1), weights, scales, strict=True)
        total, *others = [_input_gradient(*piece) for piece in pieces]
        for other in others:
            total += other
        return total

    def join(self) -> None:
        """Lay the weights beside each other. They must be plain."""
        weights, *_ = self._parameters()
        if _joined(weights) is None and len({(w.dtype, w.device) for w in weights}) == 1:
            with torch.no_grad():
                fused = torch.cat([w.data for w in weights])
            for module, rows in zip(self.modules, fused.split(self._rows()), strict=True):
                module.weight.data = rows

    def part(self) -> None:
        """Give each weight storage of its own again, where `join` took it away."""
        weights, *_ = self._parameters()
        if len(weights) > 1 and _joined(weights) is not None:
            for weight in weights:
                weight.data = weight.data.clone()

    def pack(self) -> None:
        """Keep a second copy of the weights in the layout that products of few rows are fastest in, where there is
        one; for weights that do not change until `unpack`. They must be plain and joined."""
        weights, *_ = self._parameters()
        weight = _joined(weights)
        if not self._packed and weight is not None and (packed := pack_linear(weight)) is not None:
            self._packed.append(packed)

    def unpack(self) -> None:
        """Drop the copy that `pack` made."""
        self._packed.clear()

    def _rows(self) -> list[int]:
        return [module.weight.shape[0] for module in self.modules]

    def _parameters(self) -> tuple[list[Any], list[Any] | None, list[Any]]:
        """(Weights, biases, the scales of weights that are int8)."""
        modules = [vars(module) for module in self.modules]
        owned = [module["_parameters"] for module in modules]
        biases = None if owned[0]["bias"] is None else [parameters["bias"] for parameters in owned]
        scales = [module["_buffers"].get(SCALE) for module in modules]
        return [parameters["weight"] for parameters in owned], biases, scales


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products of x: autocast's where it is on, as transformers' own forward would have it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def pack_linear(weight: Tensor) -> Tensor | None:
    """A weight, [out, in], in oneDNN's own layout, for `packed_linear`; None where it has none for it, or
    `cogsym.ops.linear` is faster with the weight as it lies."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    route = ops.route("linear", weight.device, weight.dtype, weight_dtype=weight.dtype, rows=2)
    if weight.dtype not in (torch.float32, torch.bfloat16) or route.backend != "reference":
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 32)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear` with the weight that was packed, bit for bit."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if scale is not None:
        return ops.int8_linear(x, weight, scale, bias)
    return ops.linear(x, _no_wider(weight, x.dtype), bias)


def _input_gradient(dy: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return ops.int8_linear_input_gradient(dy, weight, scale)
    return ops.linear_input_gradient(dy, _no_wider(weight, dy.dtype))


def _no_wider(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, cast where its type is not among those that `dtype` holds exactly."""
    if weight.dtype == dtype or torch.promote_types(weight.dtype, dtype) == dtype:
        return weight
    return weight.to(dtype)


def _joined(weights: list[Tensor]) -> Tensor | None:
    """The weights as one, [Σ rows, D], where they lie beside each other in memory."""
    first = weights[0]
    if len(weights) == 1:
        return first
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.storage_offset() != offset:
            return None
        if not weight.is_contiguous():
            return None
        offset += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
