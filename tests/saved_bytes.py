"""What a forward pass saves for its backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], Any], *shared: Tensor | None) -> int:
    """Bytes that `call` saves for its backward pass, storages once, without those of `shared`."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for tensor in shared:
        if tensor is not None:
            saved.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(saved.values())
