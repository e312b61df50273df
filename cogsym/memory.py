"""Bytes of memory: as people write them, and as many as are free."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable

import psutil
import torch

from cogsym.errors import CogsymError

_M_MMAP_THRESHOLD = -3  # of malloc.h
_GIVEN_BACK = 4 * 2**20  # bytes


def give_back_freed_memory() -> None:
    """Have the C library return blocks of 4 MB and more to the system as they are freed, in this process.

    glibc keeps those of up to 32 MB for blocks to come once it has seen some: weights, gradients and the optimizer's
    states of a layer are of that size, and the holes between them come to hundreds of MB.
    """
    mallopt = libc_function("mallopt")
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)


def libc_function(name: str) -> Callable[..., int] | None:
    """A function of the C library, where that is glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def parse_bytes(text: str) -> int:
    """Bytes from a size as people write it: "4GB", "512 MiB", "2e9".

    Raises:
        CogsymError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt]?)(i?)b)?\s*", text, flags=re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not number:
        raise CogsymError(f"The size of memory {text!r} is not understood; give a number with a unit, such as 4GB.")
    return int(number * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower()))


def free_bytes(device: torch.device) -> int:
    """Bytes that could still be taken on `device`, those among them that PyTorch's allocator holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was asked for and not there."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
