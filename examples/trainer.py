"""transformers' Trainer: accumulation, checkpointed activations, evaluation, the best model at the end, resuming."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import TEXTS, Losses, load, main
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import cogsym


def trainer(folder: Path, out: str, prepare: Any) -> Trainer:
    """A Trainer of a model whose outer layers are trained."""
    model, tokenizer = load(folder)
    prepare(model, cogsym.LayerPlan.outer(model.config.num_hidden_layers))
    rows = [{"input_ids": tokenizer(text + tokenizer.eos_token).input_ids} for text in TEXTS]
    arguments = TrainingArguments(
        out,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,  # of the trained layers; what frozen ones hold is the choice of `prepare`
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, arguments, collator, train_dataset=rows[4:], eval_dataset=rows[:4])


def losses(folder: Path, prepare: Any = cogsym.prepare) -> Losses:
    """Those of six steps, of held-out text between them, of the best model, and of the last two steps once more."""
    with TemporaryDirectory() as out:
        first = trainer(folder, out, prepare)
        first.train()
        best = first.evaluate()["eval_loss"]
        resumed = trainer(folder, out, prepare)
        resumed.train(resume_from_checkpoint=f"{out}/checkpoint-4")
    log = first.state.log_history
    return {
        "training": [line["loss"] for line in log if "loss" in line],
        "held-out": [line["eval_loss"] for line in log if "eval_loss" in line][:3],
        "best model": [best],
        "resumed": [line["loss"] for line in resumed.state.log_history if line["step"] > 4 and "loss" in line],
    }


if __name__ == "__main__":
    main(losses)
