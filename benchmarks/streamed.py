"""A sweep of a model that is read from disk one layer at a time beside the same sweep of the model in memory.

    python benchmarks/streamed.py

The model has Qwen2.5-1.5B's shape and random bfloat16 weights, written to a temporary folder; the sweep asks two-way
choices under every number of last layers skipped. Each sweep is a process of its own, which reports its seconds, with
and without loading and hashing the weights, and its peak resident memory with everything in it, Python and its
libraries too; the files stay in the page cache. Answers must be the same
but for rounding: documents are asked in pieces of another size.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cogsym.bench import process
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.checkpoint import WORDS, write_model
from cogsym.bench.method import Variant
from cogsym.bench.models import shape_of
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main
from cogsym.sweeps.results.store import frame

QUESTIONS, CONTEXT_WORDS, OPTION_WORDS, ROUNDS = 20, 36, 8, 3
CONFIGS, BUDGET = "output", 500 * 10**6
ROUNDING = 0.5  # nats of a margin in bfloat16, random weights; the margins themselves are of some 5
STREAMED = f"{OURS}, streamed"
SWEEP = """
import resource, time
import cogsym
from cogsym.sweeps import runner

asking, ask = [], runner._Sweep.ask
def timed(*args):
    began = time.perf_counter()
    ask(*args)
    asking.append(time.perf_counter() - began)
runner._Sweep.ask = timed
began = time.perf_counter()
cogsym.sweep(model, configs, [task], out, settings=cogsym.SweepSettings(stream=stream, memory_budget=budget))
whole = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": sum(asking), "seconds_in_all": whole, "peak_bytes": peak}))
"""


def cases(setting: Setting) -> list[CaseSpec]:
    rounds = ROUNDS if setting.full else 1
    return [
        CaseSpec(f"{shape_of(model).name}, bfloat16", partial(case, model, setting.work), rounds)
        for model in setting.models
    ]


def write_questions(file: Path) -> None:
    chance = random.Random(0)

    def words(number: int) -> str:
        return " ".join(chance.choices(WORDS, k=number))

    rows = [
        {"question": words(CONTEXT_WORDS), "a": words(OPTION_WORDS), "b": words(OPTION_WORDS), "label": i % 2}
        for i in range(QUESTIONS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def case(model: str, work: Path) -> Case:
    folder, questions = work / "model", work / "questions.jsonl"
    parameters = write_model(model, folder)
    write_questions(questions)
    task = {
        "name": "choices", "kind": "choice", "data": str(questions), "template": "{question} {option}",
        "options": ["{a}", "{b}"], "label": "label", "metrics": ["margin"],
    }  # fmt: skip
    result = Case(facts={"parameters": parameters, "documents": QUESTIONS, "memory_budget": BUDGET})
    answers: list[Any] = []

    def sweep(stream: bool) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=work) as out:
            asked = {"model": str(folder), "configs": CONFIGS, "task": task, "out": out, "stream": stream}
            printed = process.run_python(SWEEP, **asked, budget=BUDGET)
            reported: dict[str, float] = json.loads(printed.splitlines()[-1])
            answers.append(frame(Path(out)).sort_values(["configuration", "document", "metric"]))
        if not np.allclose(answers[-1]["value"], answers[0]["value"], rtol=0, atol=ROUNDING):
            raise AssertionError("streamed answers are others")
        result.facts["configurations"] = answers[0]["configuration"].nunique()
        return reported

    for label, stream in ((STREAMED, True), (OURS, False)):
        result.variants[label] = Variant(partial(sweep, stream), warm_up=False, reports=True)
    return result


def table(lines: list[Line]) -> Table:
    rows = []
    for line in lines:
        for label, name in ((OURS, "in memory"), (STREAMED, "`--stream`")):
            result = line["variants"][label]
            seconds = [f"{result[name]:.1f}" for name in ("seconds", "seconds_in_all")]
            rows.append([name, f"{result['peak_bytes'] / 1e9:.2f} GB", *seconds])
    return ["layers", "memory at its peak, all in all", "seconds", "with loading and hashing"], rows


STUDY = Study("streamed", cases, table, pictures=(), models=("Qwen2.5-1.5B",))

if __name__ == "__main__":
    main(STUDY, __doc__)
