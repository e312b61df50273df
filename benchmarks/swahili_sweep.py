"""Which layers of SmolLM2-135M understand Swahili after the CogSym recipe, and which ones speak it.

    python benchmarks/swahili_sweep.py --model MODEL_FOLDER --data TEXT_FOLDER --out OUT

MODEL_FOLDER is a model that `benchmarks/swahili.py` made. Layers are skipped from the input side, from the output side
and from both, 466 configurations, on XCOPA in Swahili (150 questions), the English side of GlobalVoices given the
Swahili one (40 pairs), and NTREX in Swahili (24 sentences). Some five minutes of one core; the same command goes on
where it was stopped. Results: `benchmarks/results/swahili_sweep.json` and two pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from cogsym import SweepSettings, sweep
from cogsym.bench import machine
from cogsym.sweeps.results.plots import plot

RESULTS = Path(__file__).parent / "results"
MEMORY = 120_000_000  # of states at a time, so that a piece takes about half a minute


def main() -> None:
    """Sweep, or go on, and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    tasks = [
        f"xcopa-sw:{args.data}/xcopa/sw.test.jsonl,name=XCOPA-sw,limit=150",
        f"text:{args.data}/ntrex-128/swa.jsonl#text,name=NTREX-sw,language=sw,limit=24",
        f"sw-en:{args.data}/globalvoices-en-sw/test.jsonl,name=sw to en,limit=40,shots=0,metrics=[bits_per_byte]",
    ]
    settings = SweepSettings(separator="<|endoftext|>", memory_budget=MEMORY)
    resume = (args.out / "sweep.json").exists()
    table = sweep(args.model, "input,output,grid", tasks, args.out, settings=settings, resume=resume)
    assert table is not None
    ends = table[table["direction"].isin(["none", "input", "output", "all"])]
    columns = ["task", "metric", "direction", "k", "documents", "value", "low", "high"]
    result = {
        "command": "python benchmarks/swahili_sweep.py --model MODEL_FOLDER --data TEXT_FOLDER --out OUT",
        "machine": machine.describe(),
        "model": "SmolLM2-135M-Instruct, its outer 25 % trained on 204,800 tokens of Swahili news, bfloat16",
        "configurations": table["configuration"].nunique(),
        "values": ends[columns].round(4).to_dict("records"),
    }
    (RESULTS / "swahili_sweep.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for path in plot(args.out):
        if path.suffix == ".png":
            shutil.copy(path, RESULTS / f"swahili_sweep_{path.name}")


if __name__ == "__main__":
    main()
