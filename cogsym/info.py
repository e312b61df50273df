"""What is here: versions, processor, GPU, and the backend of each operation."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from cogsym import ops
from cogsym.ops import backend, cpp, products

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_DTYPES = (*_HALF_DTYPES, torch.float32)
_PACKAGES = ("cogsym", "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def describe() -> list[tuple[str, str]]:
    """(what, value) pairs to print."""
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows.append(("processor", _processor()))
    waiting = [f", {name} {os.environ[name]}" for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ]
    rows.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores{''.join(waiting)}"))
    rows.append(("extension", _extension()))
    rows.append(("products", ", ".join(map(_products, _HALF_DTYPES))))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"gpu {i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("gpu", "none that torch can use"))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name, operation in ops.operations().items():
        if operation.part_of is None:
            rows.append((name, "; ".join(f"{_routes(operation, torch.device(d))} on {d}" for d in devices)))
    return rows


def _routes(operation: ops.Operation, device: torch.device) -> str:
    """Its backends on a device, and for which dtypes where they differ; with no option that restricts."""
    found: dict[ops.Route, list[str]] = {}
    for dtype in _DTYPES:
        found.setdefault(operation.route(device, dtype), []).append(str(dtype).removeprefix("torch."))
    alike = len(found) == 1
    return ", ".join(
        route.backend
        + ("" if alike else f" in {' and '.join(dtypes)}")
        + (f" ({route.reason})" if route.reason else "")
        for route, dtypes in found.items()
    )


def _products(dtype: torch.dtype) -> str:
    used = "" if products.native(dtype) else " (with --dtype auto computed in float32)"
    return f"{str(dtype).removeprefix('torch.')} at {products.relative_speed(dtype):.2g} times float32's speed{used}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    if backend.unavailable("cpp"):
        return platform.processor() or platform.machine()
    return ", ".join([platform.machine(), *cpp.extension.cpu_features()])


def _extension() -> str:
    if reason := backend.unavailable("cpp"):
        return f"not built ({reason}); operations run in plain PyTorch. Install a C++ compiler and cogsym again."
    return f"built, running its {cpp.extension.isa()} kernels"
