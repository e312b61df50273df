"""What the operations' calls of the C++ extension `cogsym._C` have in common.

Each operation's file calls its kernels with addresses and strides. Rows may be strided, so that a slice of a fused
projection is read where it lies; a copy is made only of what is not contiguous along its last dimension.

The extension holds its kernels once for each instruction set and uses the fastest one that the processor runs. The
environment variable ``COGSYM_CPU_ISA`` names a slower one, to compare them or to hunt a fault.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from cogsym.errors import CogsymError

try:
    import cogsym._C as extension  # noqa: N811
except ImportError:  # `backend.unavailable` says why, and nothing calls what needs it
    extension = None  # type: ignore[assignment]

__all__ = ["DTYPES", "address", "contiguous_rows", "empty_like", "extension", "rows", "table"]

DTYPES = {} if extension is None else {getattr(torch, name): code for code, name in enumerate(extension.DTYPES)}


def _choose_isa() -> None:
    name = os.environ.get("COGSYM_CPU_ISA")
    if not name or extension is None:
        return
    if name not in extension.isas():
        expected = ", ".join(extension.isas())
        raise CogsymError(
            f"COGSYM_CPU_ISA is {name!r}, expected one of {expected} on this processor; correct or unset it."
        )
    extension.set_isa(name)


_choose_isa()


def empty_like(x: Tensor) -> Tensor:
    """Contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def address(x: Tensor | None) -> int:
    """0 for none."""
    return 0 if x is None else x.data_ptr()


def contiguous_rows(x: Tensor) -> Tensor:
    """`x`, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """`x` as [rows, D], a view where its strides allow it."""
    return contiguous_rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def table(x: Tensor) -> Tensor:
    """A weight, cos or sin in a dtype that the kernels read."""
    return contiguous_rows(x if x.dtype in DTYPES else x.float())
