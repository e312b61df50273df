"""TRL's SFTTrainer: chats packed into rows, of which what the assistant says is learned."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import CHATS, Losses, load, main
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import cogsym


def losses(folder: Path, prepare: Any = cogsym.prepare) -> Losses:
    """Those of six steps."""
    model, tokenizer = load(folder)
    prepare(model, cogsym.LayerPlan.outer(model.config.num_hidden_layers))
    with TemporaryDirectory() as out:
        arguments = SFTConfig(
            out,
            assistant_only_loss=True,
            packing=True,
            max_length=64,
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        )
        rows = Dataset.from_list([{"messages": chat} for chat in CHATS])
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return {"training": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


if __name__ == "__main__":
    main(losses)
