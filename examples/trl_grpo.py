"""TRL's GRPOTrainer: the model writes, a function rewards, and what was rewarded becomes more likely."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import TEXTS, Losses, load, main
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import cogsym


def vowels(completions: list[str], **_: Any) -> list[float]:
    """What is rewarded: the share of vowels in what was written."""
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def losses(folder: Path, prepare: Any = cogsym.prepare) -> Losses:
    """Those of six steps, and the rewards of what was written in each."""
    model, tokenizer = load(folder)
    prepare(model, cogsym.LayerPlan.outer(model.config.num_hidden_layers))
    with TemporaryDirectory() as out:
        arguments = GRPOConfig(
            out,
            max_steps=6,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=12,
            beta=0.1,  # how far it goes from the model as it was counts too
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        )
        rows = Dataset.from_list([{"prompt": text.split()[0]} for text in TEXTS])
        trainer = GRPOTrainer(model, vowels, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    log = [line for line in trainer.state.log_history if "reward" in line]
    return {"training": [line["loss"] for line in log], "reward": [line["reward"] for line in log]}


if __name__ == "__main__":
    main(losses)
