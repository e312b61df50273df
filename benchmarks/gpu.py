"""Everything that wants a GPU, in one command of under ten minutes; no network is needed. Not run on a GPU yet.

    python benchmarks/gpu.py --out benchmarks/results/gpu/h100

needs torch 2.11 or newer and Triton 3.6 or newer; the C++ extension need not be built. It checks every kernel and block
in bfloat16, float32 and float16 against float64, then measures operations, what Python costs, writing, scoring and
training at the shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, and last the same beside torch.compile and
the competitors that are installed. Whatever fails, crashes, hangs or does not fit is noted with its reason, and the
rest goes on: the folder has a result file of each stage, written anew after every case, and `tables.md`. Its exit
status is 1 where something is not right. `--device cpu --tiny` runs the same code in some minutes on any machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 540.0
STARTED = time.perf_counter()


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what is not done by then is left out")
    parser.add_argument("--out", type=Path, default=Path("cogsym-bench-gpu"), help="folder of the result files")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from cogsym.bench import gpu, report, supervised

    command = f"python benchmarks/gpu.py --device {args.device}{' --tiny' if args.tiny else ''}"
    seconds = args.seconds - (time.perf_counter() - STARTED)  # imports take some
    whole = supervised.run(partial(gpu.stages, args.device, args.tiny), args.out, command, seconds)
    checks = report.read(args.out / "parity.json")["cases"]
    wrong = [line["name"] for line in checks if not line["facts"]["right"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks are right{': not ' * bool(wrong)}{'; '.join(wrong)}")
    print(f"The tables are in {args.out / supervised.TABLES}; please commit the folder.")
    sys.exit(0 if whole and not wrong else 1)


if __name__ == "__main__":
    main()
