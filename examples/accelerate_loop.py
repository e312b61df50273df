"""A loop of one's own on several processes: `accelerate launch examples/accelerate_loop.py`, or torchrun.

With `--use_fsdp --fsdp_version 2` accelerate shards the prepared model; else each process holds all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import TEXTS, Losses, load, main
from torch.utils.data import DataLoader

import cogsym

ROWS = 4  # a step, of all processes


def losses(folder: Path, prepare: Any = cogsym.prepare, accelerator: Accelerator | None = None) -> Losses:
    """Those of four steps, the mean over the processes."""
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    model, tokenizer = load(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    rows = torch.tensor([row[: min(map(len, ids))] for row in ids])  # as many tokens to each process

    prepare(model, cogsym.LayerPlan.outer(model.config.num_hidden_layers)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    loader: Any = DataLoader(rows, batch_size=ROWS // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(accelerator.reduce(loss.detach(), "mean").item())
    return {"training": found}


if __name__ == "__main__":
    main(losses)
