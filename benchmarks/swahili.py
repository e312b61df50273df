"""The real run: SmolLM2-135M learns Swahili, by the CogSym recipe, by full fine-tuning and by LoRA.

    python benchmarks/swahili.py --model SMOLLM2_FOLDER --data TEXT_FOLDER --work RUNS

trains on the Swahili side of GlobalVoices (TEXT_FOLDER/globalvoices-en-sw), each method at each of its learning rates
on the same tokens, chooses a method's rate by bits per byte on GlobalVoices' dev set, and scores the chosen model on
text that no choice has seen: NTREX in Swahili and English (bits per byte) and XCOPA in Swahili (accuracy and margin).
Finished runs in RUNS are not repeated, so methods can be trained beforehand, in processes of their own:
`--case outer`.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cogsym
from cogsym.bench.case import Case, CaseSpec, Line, Setting
from cogsym.bench.models import shape_of
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main
from cogsym.data import Source, pack, separator_id, tokenize
from cogsym.models.loading import load_config, load_model, load_tokenizer
from cogsym.training.evaluate import bits_per_byte, option_log_probabilities

SEPARATOR = "<|endoftext|>"
LENGTH, BATCH = 512, 4
STEPS = {True: 100, False: 2}  # by whether the run is full
RATES = {"outer": (3e-4, 1e-3, 2e-3, 4e-3), "all": (1e-4, 3e-4, 8e-4, 2e-3), "lora": (1e-3, 3e-3, 8e-3, 2e-2)}
LORA_RANK, DEV_LINES = 16, 250
CONNECTIVES = {"cause": " kwa sababu ", "effect": " kwa hiyo "}
NAMES = {
    "before": "before",
    "outer": "CogSym, outer 25 %",
    "all": "full fine-tuning",
    "lora": "LoRA (rank 16) on the outer 25 %",
}


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = map(Path, setting.models)
    trained = [CaseSpec(method, partial(case, method, model, setting)) for method in RATES]
    return [CaseSpec("before", lambda: Case(facts=score(model, setting))), *trained]


def case(method: str, model: Path, setting: Setting) -> Case:
    """A method at each of its rates, and the held-out scores of the best by the dev set."""
    records = [train(method, rate, model, setting) for rate in RATES[method][: None if setting.full else 1]]
    best = min(records, key=lambda record: record["dev_bits_per_byte"])
    facts = best | score(setting.work / f"{method}-{best['learning_rate']:g}" / "model", setting)
    return Case(facts=facts | {"tried": {f"{r['learning_rate']:g}": r["dev_bits_per_byte"] for r in records}})


def train(method: str, rate: float, model: Path, setting: Setting) -> dict[str, Any]:
    """What is noted of a run, which is not repeated where it is there."""
    folder, texts = setting.work / f"{method}-{rate:g}", setting.data / "globalvoices-en-sw"
    record, dev = folder / "record.json", setting.work / "dev.jsonl"
    if record.exists():
        known: dict[str, Any] = json.loads(record.read_text("utf-8"))
        return known
    shutil.rmtree(folder, ignore_errors=True)
    setting.work.mkdir(parents=True, exist_ok=True)
    dev.write_text("".join((texts / "dev.jsonl").read_text("utf-8").splitlines(keepends=True)[:DEV_LINES]), "utf-8")
    layers, steps = shape_of(str(model)).layers, STEPS[setting.full]
    result = cogsym.train(
        model,
        [Source(texts / "train.jsonl", field="sw")],
        folder,
        plan=cogsym.LayerPlan.all(layers) if method == "all" else cogsym.LayerPlan.outer(layers),
        evaluate={"dev": Source(dev, field="sw")},
        settings=cogsym.TrainSettings(
            length=min(LENGTH, load_config(model).max_position_embeddings),
            batch_size=BATCH,
            steps=steps,
            learning_rate=rate,
            lora_rank=LORA_RANK if method == "lora" else None,
            separator=separator(model),
            save_every=steps,
        ),
        cache_dir=setting.work / "cache",
    )
    shutil.rmtree(folder / "checkpoints")
    noted = {
        "learning_rate": rate,
        "dev_bits_per_byte": result.bits_per_byte("dev")[-1],
        "trained_parameters": result.trained_parameters,
        "tokens": steps * BATCH * LENGTH,
        "seconds": result.seconds,
        "losses": [line["loss"] for line in result.history if "loss" in line],
    }
    record.write_text(json.dumps(noted), "utf-8")
    return noted


def separator(model: Path) -> str | None:
    """SmolLM2's, whose bos is the marker of a chat; of another tokenizer its own."""
    return SEPARATOR if SEPARATOR in load_tokenizer(model).get_vocab() else None


def xcopa(model: Any, tokenizer: Any, data: Path, between: int) -> dict[str, float]:
    """Share of Swahili questions answered right, and the mean margin in nats of the right answer."""
    lines = [json.loads(line) for line in (data / "xcopa" / "sw.test.jsonl").read_text("utf-8").splitlines()]
    questions = []
    for line in lines:
        premise = line["premise"].strip().rstrip(".") + CONNECTIVES[line["question"]].rstrip()
        questions.append((premise, [" " + c[:1].lower() + c[1:] for c in (line["choice1"], line["choice2"])]))
    scores = option_log_probabilities(model, tokenizer, questions, between)
    margins = [s[q["label"]] - s[1 - q["label"]] for s, q in zip(scores, lines, strict=True)]
    return {
        "questions": len(margins),
        "accuracy": sum(m > 0 for m in margins) / len(margins),
        "mean_margin_nats": sum(margins) / len(margins),
    }


def score(folder: Path, setting: Setting) -> dict[str, Any]:
    """Held-out scores of a model on disk."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    between = separator_id(tokenizer, separator(folder))
    scores: dict[str, Any] = {}
    for language in ("swa", "eng"):
        text = tokenize(Source(setting.data / "ntrex-128" / f"{language}.jsonl"), tokenizer, "all", between)
        scores[f"ntrex_{language}_bits_per_byte"] = bits_per_byte(model, pack(text, LENGTH, None), batch_size=BATCH)
    return scores | {"xcopa_sw": xcopa(model, tokenizer, setting.data, between)}


def table(lines: list[Line]) -> Table:
    """Held-out scores before and after, by method."""
    methods = {line["name"]: line["facts"] for line in lines}
    rows = []
    for method, facts in methods.items():
        swahili, xcopa_sw = facts["ntrex_swa_bits_per_byte"], facts["xcopa_sw"]
        compared = method not in ("before", "all") and "all" in methods
        rows.append(
            [
                NAMES[method],
                f"{facts['trained_parameters'] / 1e6:.1f} M" if "trained_parameters" in facts else "",
                f"{facts['learning_rate']:g}" if "learning_rate" in facts else "",
                f"{swahili:.3f}",
                f"{swahili / methods['all']['ntrex_swa_bits_per_byte'] - 1:+.1%}" if compared else "",
                f"{facts['ntrex_eng_bits_per_byte']:.3f}",
                f"{xcopa_sw['accuracy']:.1%} {chance(xcopa_sw)}".strip(),
                f"{xcopa_sw['mean_margin_nats']:+.2f}",
            ]
        )
    head = [
        "", "trained", "rate", "Swahili, bits per byte", "gap to full", "English, bits per byte", "XCOPA-sw",
        "margin, nats",
    ]  # fmt: skip
    return head, rows


def chance(scores: dict[str, float]) -> str:
    """Says so where an accuracy of two choices is within two standard errors of one half."""
    return "(chance)" if abs(scores["accuracy"] - 0.5) < 2 * 0.5 / scores["questions"] ** 0.5 else ""


STUDY = Study("swahili", cases, table, pictures=(), needs=("model", "data", "work"))

if __name__ == "__main__":
    main(STUDY, __doc__)
