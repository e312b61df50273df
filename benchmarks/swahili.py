"""The real run: SmolLM2-135M learns Swahili, by the CogSym recipe, by full fine-tuning and by LoRA.

    python benchmarks/swahili.py --model SMOLLM2_FOLDER --data TEXT_FOLDER --out RUNS

trains on the Swahili side of GlobalVoices (TEXT_FOLDER/globalvoices-en-sw), each method at each of its learning rates
on the same tokens, chooses a method's rate by bits per byte on GlobalVoices' dev set, and scores the chosen model on
text that no choice has seen: NTREX in Swahili and English (bits per byte) and XCOPA in Swahili (accuracy and margin).
Finished runs are not repeated, so methods can be trained beforehand, in processes of their own: `--only outer`. The
result is `benchmarks/results/swahili.json`, from which the README's table is made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cogsym
from cogsym.bench import machine
from cogsym.data import Source, pack, separator_id, tokenize
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.training.evaluate import bits_per_byte, option_log_probabilities

SEPARATOR = "<|endoftext|>"
STEPS, LENGTH, BATCH = 100, 512, 4
RATES = {"outer": (3e-4, 1e-3, 2e-3, 4e-3), "all": (1e-4, 3e-4, 8e-4, 2e-3), "lora": (1e-3, 3e-3, 8e-3, 2e-2)}
LORA_RANK = 16
RESULT = Path(__file__).parent / "results" / "swahili.json"
CONNECTIVES = {"cause": " kwa sababu ", "effect": " kwa hiyo "}


def train_all(model: Path, data: Path, out: Path, only: str | None) -> dict[str, list[dict[str, Any]]]:
    """Every method at each of its rates; the dev score of each."""
    folder = data / "globalvoices-en-sw"
    dev = out / "dev.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if not dev.exists():
        dev.write_text("".join((folder / "dev.jsonl").read_text("utf-8").splitlines(keepends=True)[:250]), "utf-8")
    runs: dict[str, list[dict[str, Any]]] = {}
    # Rates outside, methods inside: a run of the study that ends early has tried all methods.
    for i in range(max(map(len, RATES.values()))):
        for method, rates in RATES.items():
            if i >= len(rates) or only not in (None, method):
                continue
            rate = rates[i]
            record = out / f"{method}-{rate:g}" / "record.json"
            if not record.exists():
                shutil.rmtree(record.parent, ignore_errors=True)
                num_layers = 30
                everything = method == "all"
                result = cogsym.train(
                    model,
                    [Source(folder / "train.jsonl", field="sw")],
                    record.parent,
                    plan=cogsym.LayerPlan.all(num_layers) if everything else cogsym.LayerPlan.outer(num_layers),
                    evaluate={"dev": Source(dev, field="sw")},
                    settings=cogsym.TrainSettings(
                        length=LENGTH,
                        batch_size=BATCH,
                        steps=STEPS,
                        learning_rate=rate,
                        lora_rank=LORA_RANK if method == "lora" else None,
                        separator=SEPARATOR,
                        save_every=STEPS,
                    ),
                    cache_dir=out / "cache",
                )
                shutil.rmtree(record.parent / "checkpoints")
                losses = [line["loss"] for line in result.history if "loss" in line]
                line = {
                    "learning_rate": rate,
                    "dev_bits_per_byte": result.bits_per_byte("dev")[-1],
                    "trained_parameters": result.trained_parameters,
                    "tokens": STEPS * BATCH * LENGTH,
                    "seconds": result.seconds,
                    "losses": losses,
                }
                record.write_text(json.dumps(line), "utf-8")
            runs.setdefault(method, []).append(json.loads(record.read_text("utf-8")))
    return runs


def xcopa(model: Any, tokenizer: Any, data: Path) -> dict[str, float]:
    """Share of Swahili questions answered right, and the mean margin in nats of the right answer."""
    lines = [json.loads(line) for line in (data / "xcopa" / "sw.test.jsonl").read_text("utf-8").splitlines()]
    questions = []
    for line in lines:
        premise = line["premise"].strip().rstrip(".") + CONNECTIVES[line["question"]].rstrip()
        questions.append((premise, [" " + c[:1].lower() + c[1:] for c in (line["choice1"], line["choice2"])]))
    scores = option_log_probabilities(model, tokenizer, questions, separator_id(tokenizer, SEPARATOR))
    margins = [s[q["label"]] - s[1 - q["label"]] for s, q in zip(scores, lines, strict=True)]
    return {
        "questions": len(margins),
        "accuracy": sum(m > 0 for m in margins) / len(margins),
        "mean_margin_nats": sum(margins) / len(margins),
    }


def score(folder: Path, tokenizer: Any, data: Path) -> dict[str, Any]:
    """Held-out scores of a model on disk."""
    model = load_model(folder)
    separator = separator_id(tokenizer, SEPARATOR)
    scores: dict[str, Any] = {}
    for language in ("swa", "eng"):
        text = tokenize(Source(data / "ntrex-128" / f"{language}.jsonl"), tokenizer, "all", separator)
        scores[f"ntrex_{language}_bits_per_byte"] = bits_per_byte(model, pack(text, 512, None), batch_size=4)
    return scores | {"xcopa_sw": xcopa(model, tokenizer, data)}


def main() -> None:
    """Train, choose, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", choices=RATES)
    args = parser.parse_args()
    runs = train_all(args.model, args.data, args.out, args.only)
    if args.only:
        return
    tokenizer = load_tokenizer(args.model)
    methods: dict[str, Any] = {"before": score(args.model, tokenizer, args.data)}
    for method, lines in runs.items():
        best = min(lines, key=lambda line: line["dev_bits_per_byte"])
        folder = args.out / f"{method}-{best['learning_rate']:g}" / "model"
        methods[method] = {**best, **score(folder, tokenizer, args.data)}
        methods[method]["tried"] = {f"{line['learning_rate']:g}": line["dev_bits_per_byte"] for line in lines}
    result = {
        "command": "python benchmarks/swahili.py --model SMOLLM2_FOLDER --data TEXT_FOLDER --out RUNS",
        "machine": machine.describe(),
        "model": "SmolLM2-135M-Instruct (from a 4-bit file)",
        "train": f"GlobalVoices, Swahili side, {STEPS} steps of {BATCH} x {LENGTH} tokens, bf16",
        "methods": methods,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    json.dump({m: {k: v for k, v in s.items() if k != "losses"} for m, s in methods.items()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
