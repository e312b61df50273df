"""Everything that wants a GPU, in one command of under ten minutes; no network is needed. Not run on a GPU yet.

    python benchmarks/gpu.py

needs torch 2.11 or newer, Triton 3.6 or newer, and for the CUDA sources nvcc. It builds the extension in place, checks
every kernel and block in float32, float16 and bfloat16 against float64, then measures operations, training, sweeps and
writing at the shapes of Llama-3.2-1B and Llama-3.1-8B, beside the competitors that are installed, and writes one result
file, `benchmarks/results/gpu.json`. Its exit status is 1 where something is not right. `--device cpu --tiny` runs the
same code in a minute on any machine, at a tiny shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("Llama-3.2-1B", "Llama-3.1-8B")
# Of at most; the rest of ten minutes is for building and parity. What is left out is in the file, with that reason.
SECONDS = {"ops": 80.0, "train": 150.0, "sweep": 90.0, "generate": 90.0}


def build_extension() -> None:
    """In place, with the CUDA sources where nvcc is."""
    cuda = {"COGSYM_CUDA": "1"} if shutil.which("nvcc") else {}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | cuda)


def main() -> None:
    """Build, check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, and the extension as it is")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args()
    if not args.tiny:
        build_extension()
    sys.path.insert(0, str(ROOT))
    import torch
    from rich.console import Console

    from cogsym.bench import machine, parity, report
    from cogsym.bench.case import Setting
    from cogsym.bench.run import PARTS, measured

    models = ("tiny",) if args.tiny else MODELS
    setting = Setting(models, torch.device(args.device), full=not args.tiny)
    console = Console()
    result: dict[str, Any] = {
        "format": report.FORMAT,
        "command": f"python benchmarks/gpu.py --device {args.device}{' --tiny' if args.tiny else ''}",
        "machine": machine.describe(),
        "setting": {"models": list(models), "device": args.device, "full": setting.full},
        "parity": [],
        "cases": [],
    }
    start = time.perf_counter()
    for line in parity.check(models, setting.device):
        result["parity"].append(line)
        if not line["right"]:
            console.print(f"not right: {line}", markup=False)
    console.print(f"parity: {len(result['parity'])} checks, {time.perf_counter() - start:.0f} s", highlight=False)
    for part, seconds in SECONDS.items():
        share = seconds / 60 if args.tiny else seconds
        short = part in ("sweep", "generate")  # of these a full run takes longer than there is
        cases = PARTS[part](dataclasses.replace(setting, full=False) if short else setting)
        result["cases"] += measured(cases, setting.device, share, lambda name: console.print(name))
        report.write(result, args.out)
    report.draw(result, args.out)
    report.show(result, console)
    sys.exit(0 if all(line["right"] for line in result["parity"]) else 1)


if __name__ == "__main__":
    main()
