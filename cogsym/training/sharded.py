"""Weights that the ranks of a run hold in parts, by FSDP2: each decoder layer for itself, and all the rest together.

A part is a `DTensor`. What is written is whole, and what is read is whole too, so that checkpoints are the same
whatever the number of ranks and whether they share the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cogsym.decoder import layers_of


def shard(model: Any) -> None:
    """Leave each rank a part of every parameter, on its device; in place.

    accelerate shards on GPUs alone, so it is told to leave the model as it is.
    """
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    model._is_accelerate_prepared = True


def bytes_held(model: nn.Module) -> tuple[int, int]:
    """(Bytes of the parameters that this rank holds, bytes of all of them)."""
    parameters = list(model.parameters())
    here = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return sum(t.nbytes for t in here), sum(p.numel() * p.itemsize for p in parameters)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a part; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], here: bool) -> dict[str, Tensor]:
    """Tensors of which ranks may hold parts, whole where `here` is set and none elsewhere; every rank must ask."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if here:
            found[name] = full.contiguous()
    return found


def part_for(full: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a tensor, where it holds a part of `like`."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, whole or in parts."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
