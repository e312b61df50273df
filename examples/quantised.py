"""Frozen layers quantised by bitsandbytes (4 bits) or torchao (8 bits): they run on their own modules."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import TEXTS, Losses, load, main
from transformers import AutoConfig, BitsAndBytesConfig, TorchAoConfig

import cogsym


def four_bits(kept: list[str]) -> Any:
    """bitsandbytes' NF4, but for the modules that are kept."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept)


def eight_bits(kept: list[str]) -> Any:
    """torchao's weights of 8 bits, but for the modules that are kept."""
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)


def losses(folder: Path, prepare: Any = cogsym.prepare) -> Losses:
    """Those of four steps with each library that is installed."""
    plan = cogsym.LayerPlan.outer(AutoConfig.from_pretrained(folder).num_hidden_layers)
    kept = ["lm_head", *(f"model.layers.{i}" for i in plan.trained)]
    found: Losses = {}
    for library, quantised in (("bitsandbytes", four_bits), ("torchao", eight_bits)):
        if find_spec(library) is None:
            continue
        model, tokenizer = load(folder, quantization_config=quantised(kept))
        batch = tokenizer(TEXTS[:4], return_tensors="pt", padding=True).to(model.device)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        prepare(model, plan).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        found[library] = []
        for _ in range(4):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[library].append(loss.item())
    return found


if __name__ == "__main__":
    main(losses)
