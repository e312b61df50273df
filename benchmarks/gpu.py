"""Everything that wants a GPU, in one command of under ten minutes; no network is needed. Not run on a GPU yet.

    python benchmarks/gpu.py

needs torch 2.11 or newer and Triton 3.6 or newer. It builds the extension in place, checks
every kernel and block in float32, float16 and bfloat16 against float64, then measures operations, what Python costs,
training, sweeps and writing at the shapes of Llama-3.2-1B and Llama-3.1-8B, beside the competitors that are installed,
and writes a result file of each into one folder, `cogsym-bench-gpu`. Its exit status is 1 where something is not right.
`--device cpu --tiny` runs the same code in a minute on any machine, at a tiny shape.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("Llama-3.2-1B", "Llama-3.1-8B")
# Of at most; the rest of ten minutes is for building and parity. What is left out is in the file, with that reason.
SECONDS = {"ops": 80.0, "overhead": 15.0, "train": 150.0, "sweep": 90.0, "generate": 90.0}
QUICK = ("sweep", "generate")  # of these a full run takes longer than there is


def build_extension() -> None:
    """In place."""
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)


def main() -> None:
    """Build, check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, and the extension as it is")
    parser.add_argument("--out", type=Path, default=Path("cogsym-bench-gpu"))
    args = parser.parse_args()
    if not args.tiny:
        build_extension()
    sys.path.insert(0, str(ROOT))
    import torch

    from cogsym.bench import parity, report, study, suite
    from cogsym.bench.case import Setting

    models, device = ("tiny",) if args.tiny else MODELS, torch.device(args.device)
    work = [(parity.STUDY, Setting(models, device, full=True))]
    for part, seconds in SECONDS.items():
        full = not args.tiny and part not in QUICK
        work.append(
            (suite.STUDIES[part], Setting(models, device, full, seconds=seconds / 60 if args.tiny else seconds))
        )
    command = f"python benchmarks/gpu.py --device {args.device}{' --tiny' if args.tiny else ''}"
    checks, *_ = study.run(work, args.out, command)
    sys.exit(0 if all(line["facts"]["right"] for line in report.read(checks)["cases"]) else 1)


if __name__ == "__main__":
    main()
