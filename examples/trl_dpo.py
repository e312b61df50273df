"""TRL's DPOTrainer: one answer is preferred to another, held against the model as it was."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import TEXTS, Losses, load, main
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import cogsym


def losses(folder: Path, prepare: Any = cogsym.prepare) -> Losses:
    """Those of six steps."""
    model, tokenizer = load(folder)
    prepare(model, cogsym.LayerPlan.outer(model.config.num_hidden_layers))
    pairs = zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)
    rows = [{"prompt": a.split()[0], "chosen": a.partition(" ")[2], "rejected": b} for a, b in pairs]
    with TemporaryDirectory() as out:
        arguments = DPOConfig(
            out,
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        )
        trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    return {"training": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


if __name__ == "__main__":
    main(losses)
