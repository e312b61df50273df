"""Where a result was measured: every result file carries it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import peft
import torch
import transformers

import cogsym
from cogsym.ops import backend

# Lines of processors by a word of their names, the more special one first.
_LINES = ("xeon", "epyc", "threadripper", "ryzen", "core", "apple", "neoverse", "graviton")
# What products run on, by the widest of a processor's features; the first that it has.
_UNITS = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512bf16",
    "avx512": "avx512",
    "avx2": "avx2",
    "bf16": "bf16",
    "neon": "neon",
}
# What holds other libraries to fewer instructions, as COGSYM_CPU_ISA holds ours.
_HOLDING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# Whom the suite sets ours beside, as far as they are packages of their own.
ALTERNATIVES = (
    "cut-cross-entropy", "flash-attn", "liger-kernel", "quack-kernels", "transformer-lens", "unsloth",
)  # fmt: skip


def machine_class(machine: Mapping[str, str]) -> str:
    """The class of a machine, whose results lie in one folder and are never mixed with another's.

    A GPU's is its model, such as "h100". A processor's is its line and what its products run on, such as "xeon-amx",
    "epyc-avx2" or "neoverse-bf16": two of a class differ in clocks and cores, of two classes each has other kernels.
    One that was held to fewer instructions than it has is of a class of its own, such as "xeon-held-to-avx2".

    Args:
        machine: as `describe` has it.
    """
    if machine["gpu"] != "none":
        words = machine["gpu"].partition(",")[0].lower().split()
        return next((word for word in words if any(map(str.isdigit, word))), words[-1])
    name, _, features = machine["processor"].rpartition(" (")
    if not features.endswith(")"):  # no extension, which tells them
        name, features = machine["processor"], ""
    line = next((line for line in _LINES if line in name.lower()), "processor")
    if held := machine.get("held to"):
        return f"{line}-held-to-{held}"
    has = features.removesuffix(")").split(", ")
    return f"{line}-{next((unit for feature, unit in _UNITS.items() if feature in has), 'plain')}"


def describe() -> dict[str, str]:
    """Machine and versions, for the head of a result file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    features, held = "", {}
    if not backend.unavailable("cpp"):
        from cogsym import _C

        features = f" ({', '.join(_C.cpu_features())})"
        if _C.isa() != _C.isas()[-1]:
            held = {"held to": _C.isa(), **{name: os.environ.get(name, "not set") for name in _HOLDING}}
    found = []
    for package in ALTERNATIVES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return {
        "processor": (names[0] if names else platform.processor()) + features,
        **held,
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
