"""peft's LoRA, DoRA and rsLoRA on the planned layers; saved as adapters and loaded again, and merged."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import TEXTS, Losses, load, main
from peft import LoraConfig, PeftModel, get_peft_model

import cogsym

KINDS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}


def losses(folder: Path, prepare: Any = cogsym.prepare) -> Losses:
    """Those of four steps of each kind; of the last one then what is left where it is loaded again, and merged."""
    found: Losses = {}
    for kind, options in KINDS.items():
        model, tokenizer = load(folder)
        batch = tokenizer(TEXTS[:4], return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        plan = cogsym.LayerPlan.outer(model.config.num_hidden_layers)
        torch.manual_seed(0)  # for the adapters' first weights
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **options)
        adapted = prepare(get_peft_model(model, plan.peft_config(config)), plan).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
        found[kind] = []
        for _ in range(4):
            loss = adapted(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[kind].append(loss.item())
    with TemporaryDirectory() as out:
        adapted.save_pretrained(out)  # the adapters alone
        again = PeftModel.from_pretrained(load(folder)[0], out)
        found["loaded again"] = [again(**batch).loss.item()]
    found["merged"] = [adapted.eval().merge_and_unload()(**batch).loss.item()]
    return found


if __name__ == "__main__":
    main(losses)
