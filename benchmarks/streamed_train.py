"""`cogsym train --stream`, frozen layers on disk, beside the same run with the model in memory: time, memory, losses.

    python benchmarks/streamed_train.py

The model has Qwen2.5-1.5B's shape and random bfloat16 weights, written to a temporary folder; one row of 512 tokens a
step, frozen layers keep their input. Each run is a process of its own, which reports the median seconds of its steps
but the first, its peak resident memory with everything in it, saving the model too, and what Python and its libraries
were of that before. The files stay in the page cache. Losses must be the same but for rounding.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cogsym.bench import process, report
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.checkpoint import WORDS, write_model
from cogsym.bench.method import Variant
from cogsym.bench.models import shape_of
from cogsym.bench.study import Study, main

METHODS = {"one front and one back layer": None, "LoRA on the outer quarter": 16}  # the rank
LENGTH, STEPS, ROUNDS = 512, 6, 3
STREAMED = f"{OURS}, streamed"
TRAIN = """
import statistics, time
from pathlib import Path
import cogsym
from cogsym.data import Source
from cogsym.training.trainer import RunCallback

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

class Clock:
    def __init__(self, name):
        self.times, own = [], getattr(RunCallback, name)
        def timed(*args, **kwargs):
            self.times.append(time.perf_counter())
            return own(*args, **kwargs)
        setattr(RunCallback, name, timed)

libraries = status("VmHWM")
begun, ended = Clock("on_step_begin"), Clock("on_step_end")
layers = cogsym.LayerPlan.outer(depth) if rank else cogsym.LayerPlan.outer(depth, front=1, back=1)
settings = cogsym.TrainSettings(
    length=length, batch_size=1, steps=steps, keep="input", stream=stream, lora_rank=rank, log_every=1
)
run = cogsym.train(model, [Source(Path(text))], out, plan=layers, settings=settings)
seconds = [after - before for before, after in zip(begun.times, ended.times)]
losses = [line["loss"] for line in run.history]
print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_bytes": status("VmHWM"),
                  "library_bytes": libraries, "losses": losses}))
"""


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = setting.models
    rounds = ROUNDS if setting.full else 1
    return [
        CaseSpec(f"{shape_of(model).name}, {name}", partial(case, model, rank, setting), rounds)
        for name, rank in list(METHODS.items())[: None if setting.full else 1]
    ]


def case(model: str, rank: int | None, setting: Setting) -> Case:
    folder, text = setting.work / "model", setting.work / "text.txt"
    if not folder.exists():
        write_model(model, folder)
        chance = random.Random(0)
        text.write_text("\n".join(" ".join(chance.choices(WORDS, k=300)) for _ in range(200)), "utf-8")
    result = Case()
    asked = {
        "model": str(folder), "text": str(text), "depth": shape_of(model).layers, "rank": rank, "steps": STEPS,
        "length": LENGTH if setting.full else 32,
    }  # fmt: skip

    def train(label: str, stream: bool) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=setting.work) as out:
            printed = process.run_python(TRAIN, **asked, stream=stream, out=str(Path(out) / "run"))
        reported = json.loads(printed.splitlines()[-1])
        result.facts[f"losses, {label}"] = losses = reported.pop("losses")
        first: list[float] = next(iter(result.facts.values()))
        if not np.allclose(losses, first, rtol=0, atol=0.01):
            raise AssertionError("streamed losses are others")
        return reported

    for label, stream in ((OURS, False), (STREAMED, True)):
        result.variants[label] = Variant(partial(train, label, stream), warm_up=False, reports=True)
    return result


def cells(line: Line, result: dict[str, Any]) -> dict[str, str]:
    return {
        "memory at its peak": f"{result['peak_bytes'] / 1e9:.2f} GB",
        "of it Python": f"{result['library_bytes'] / 1e9:.2f} GB",
        "seconds a step": f"{result['seconds']:.2f}",
        "time / cogsym": report.spread(result.get("over_cogsym")),
    }


table = report.by_variant(cells, {OURS: "in memory", STREAMED: "`--stream`"}.__getitem__)
STUDY = Study("streamed_train", cases, table, pictures=(), models=("Qwen2.5-1.5B",))

if __name__ == "__main__":
    main(STUDY, __doc__)
