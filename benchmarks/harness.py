"""A task of lm-evaluation-harness over the layer configurations of the two directions, beside a loop of its HFLM.

    python benchmarks/harness.py --model MODEL_FOLDER --data TEXT_FOLDER

The task is XCOPA in Swahili (TEXT_FOLDER/xcopa/sw.test.jsonl, the first 32 questions) from a local task file. Ours is
all of `cogsym.sweep`, with reading the task, hashing the weights, writing the results and their summary. The loop loads
the task once and asks a model that holds the kept layers with the harness's own `evaluate`, at the batch size that is
fastest here. Every accuracy has to be the same but for what rounding decides.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from functools import partial
from typing import Any

import torch
import yaml
from rich.console import Console

import cogsym
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.loops import sliced
from cogsym.bench.method import Variant, fastest
from cogsym.bench.models import shape_of
from cogsym.bench.report import Table, spread
from cogsym.bench.study import Study, main
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.layers.configurations import configurations, distinct

QUESTIONS, BATCHES, ROUNDS = {True: 32, False: 4}, (1, 8, 32), 3
LOOP = "loop of HFLM"
ROUNDING = 0.1  # of the accuracy: choices that are alike to the last bits of bfloat16
TASK = {
    "task": "xcopa_local", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{premise}}", "doc_to_choice": "{{[choice1, choice2]}}", "doc_to_target": "label", "num_fewshot": 0,
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}  # fmt: skip


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = setting.models
    name = f"{shape_of(model).name}, bfloat16: input + output, {QUESTIONS[setting.full]} choices"
    return [CaseSpec(name, partial(case, model, setting), ROUNDS if setting.full else 1)]


def case(folder: str, setting: Setting) -> Case:
    from lm_eval import evaluate  # here, so that the table needs no harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions, file = QUESTIONS[setting.full], setting.work / "xcopa.yaml"
    data = {"dataset_kwargs": {"data_files": {"test": f"{setting.data}/xcopa/sw.test.jsonl"}}}
    file.write_text(yaml.safe_dump(TASK | data), "utf-8")
    model, tokenizer = load_model(folder, torch.bfloat16), load_tokenizer(folder)
    chosen, _ = distinct(configurations("input,output", model.config.num_hidden_layers, "skip"))
    loaded = TaskManager(include_defaults=False).load([str(file)])
    answers: list[dict[str, float]] = []

    def agree() -> None:
        different = [abs(answers[0][code] - value) for code, value in answers[-1].items()]
        if max(different) > ROUNDING:
            raise AssertionError(f"accuracies are others, by up to {max(different):.3f}")

    def ours() -> None:
        out = setting.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        task = f"lm_eval:{file},limit={questions}"
        cogsym.sweep(model, "input,output", [task], out, tokenizer=tokenizer, console=Console(file=io.StringIO()))
        results = json.loads((out / "lm_eval.json").read_text())
        answers.append({code: of["xcopa_local"]["acc,none"] for code, of in results.items()})
        agree()

    def ask(lm: HFLM, configuration: Any) -> float:
        with sliced(model, configuration), contextlib.redirect_stderr(io.StringIO()):
            found = evaluate(lm, loaded, limit=questions, bootstrap_iters=0, log_samples=False)
        return found["results"]["xcopa_local"]["acc,none"]

    middle = chosen[len(chosen) // 4]
    models = {batch: HFLM(model, tokenizer=tokenizer, batch_size=batch) for batch in BATCHES}
    batch = next(iter(fastest({batch: partial(ask, lm, middle) for batch, lm in models.items()})))

    def loop() -> None:
        answers.append({c.code: ask(models[batch], c) for c in chosen})
        agree()

    variants = {OURS: Variant(ours), LOOP: Variant(loop, warm_up=False)}
    facts = {"configurations": len(chosen), "documents": questions, "batch": batch}
    return Case(variants, facts=facts)


def table(lines: list[Line]) -> Table:
    rows: list[list[str]] = []
    for line in lines:
        for label in (OURS, LOOP):
            of = line["variants"][label]
            ratio = spread(of["over_cogsym"]) if label == LOOP else ""
            rows.append([line["name"] if label == OURS else "", label, f"{of['seconds']:.1f}", ratio])
    return ["", "", "seconds", "time / cogsym"], rows


STUDY = Study("harness", cases, table, pictures=(), needs=("model", "data"))

if __name__ == "__main__":
    main(STUDY, __doc__)
