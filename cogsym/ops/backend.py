"""Which backend serves an operation here: the plain reference, the C++ extension, or Triton.

CPU tensors go to the C++ extension where it was built, CUDA tensors to Triton where it is installed, and everything
else to the reference in plain PyTorch. The environment variable ``COGSYM_BACKEND`` (``reference``, ``cpp`` or
``triton``) forces one, for comparison and for hunting a fault.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from cogsym.errors import CogsymError

BACKENDS = ("reference", "cpp", "triton")
# What the kernels read and write; everything inside is computed in float32 (float64 for float64).
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    if backend == "reference":
        return None
    # The extension links to the OpenMP library that torch has already loaded: torch is imported first, above.
    module = {"cpp": "cogsym._C", "triton": "triton"}[backend]
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not import: {error}"
    return None


def forced() -> str | None:
    """The backend named by ``COGSYM_BACKEND``, or None.

    Raises:
        CogsymError: the name is unknown or that backend cannot run here.
    """
    name = os.environ.get("COGSYM_BACKEND")
    if not name:
        return None
    if name not in BACKENDS:
        raise CogsymError(f"COGSYM_BACKEND is {name!r}, expected one of {', '.join(BACKENDS)}; correct or unset it.")
    if reason := unavailable(name):
        raise CogsymError(f"COGSYM_BACKEND is {name!r} but {reason}; unset it to use what is here.")
    return name


def choose(device: torch.device) -> str:
    """The backend for tensors on `device`."""
    if name := forced():
        return name
    preferred = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    return "reference" if unavailable(preferred) else preferred


def implementation(operation: str, reference: Callable[..., Any], tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that computes `operation` for tensors like `tensor`; all take the reference's arguments.

    Args:
        operation: name of the function in `cogsym.ops.cpp` and in `cogsym.kernels`.
        reference: the plain PyTorch function, served where nothing faster is at hand.
        tensor: decides by its device and dtype.
    """
    backend = choose(tensor.device)
    if backend == "reference" or tensor.dtype not in KERNEL_DTYPES:
        return reference
    return getattr(_module(backend), operation)


@functools.cache
def _module(backend: str) -> Any:
    return importlib.import_module({"cpp": "cogsym.ops.cpp", "triton": "cogsym.kernels.launch"}[backend])
