"""What is here: versions, processor, GPU, and the backend of each operation."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from cogsym.ops import OPERATIONS, backend

_PACKAGES = ("cogsym", "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def describe() -> list[tuple[str, str]]:
    """(what, value) pairs to print."""
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows.append(("processor", _processor()))
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    rows.append(("extension", _extension()))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"gpu {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("gpu", "none that torch can use"))
    forced = backend.forced()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for operation in OPERATIONS:
        served = ", ".join(f"{backend.choose(torch.device(d))} on {d}" for d in devices)
        rows.append((operation, served + (" (forced by COGSYM_BACKEND)" if forced else "")))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    if backend.unavailable("cpp"):
        return platform.processor() or platform.machine()
    from cogsym import _C

    return ", ".join([platform.machine(), *_C.cpu_features()])


def _extension() -> str:
    if reason := backend.unavailable("cpp"):
        return f"not built ({reason}); operations run in plain PyTorch. Install a C++ compiler and cogsym again."
    from cogsym.ops.cpp import _C  # where COGSYM_CPU_ISA is applied

    return f"built, running its {_C.isa()} kernels"
