"""Where a result was measured: every result file carries it."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

import peft
import torch
import transformers

import cogsym
from cogsym.ops import backend

# Whom the suite sets ours beside, as far as they are packages of their own.
ALTERNATIVES = (
    "cut-cross-entropy", "flash-attn", "liger-kernel", "quack-kernels", "transformer-lens", "unsloth",
)  # fmt: skip


def describe() -> dict[str, str]:
    """Machine and versions, for the head of a result file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features = ""
    if not backend.unavailable("cpp"):
        from cogsym import _C

        features = f" ({', '.join(_C.cpu_features())})"
    found = []
    for package in ALTERNATIVES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return {
        "processor": (names[0] if names else platform.processor()) + features,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if torch.cuda.is_available() else "none",
        "cogsym": cogsym.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "alternatives": ", ".join(sorted(found)) or "none",
    }
