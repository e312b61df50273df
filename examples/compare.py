"""Each example with a prepared model, and with the same model frozen without cogsym: the losses of both, as a table."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import transformers
from common import model_folder

import cogsym

EXAMPLES = ("trainer", "trl_sft", "trl_dpo", "trl_grpo", "peft_lora", "quantised", "accelerate_loop")


def frozen(model: Any, plan: cogsym.LayerPlan) -> Any:
    """In the place of `cogsym.prepare`: freeze what it would freeze, and do nothing else."""
    if not hasattr(model, "peft_config"):
        for part in plan.parts(model):
            for p in part.parameters:
                p.requires_grad_(part.trained)
    return model


def main() -> None:
    """Print a row for each."""
    transformers.utils.logging.set_verbosity_error()
    print("| example | losses | prepared | not prepared | largest difference |\n| --- | --- | --- | --- | ---: |")
    with model_folder() as folder:
        for name in EXAMPLES:
            try:
                losses = importlib.import_module(name).losses
            except ImportError as missing:
                print(f"| {name} | {missing} | | | |")
                continue
            with contextlib.redirect_stdout(io.StringIO()):  # Trainer prints its logs
                ours, theirs = losses(folder), losses(folder, frozen)
            for what, values in ours.items():
                pairs = list(zip(values, theirs[what], strict=True))
                columns = [" ".join(f"{value:.5f}" for value in column) for column in zip(*pairs, strict=True)]
                largest = max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
                print(f"| {name} | {what} | {' | '.join(columns)} | {largest:.1e} |", flush=True)


if __name__ == "__main__":
    main()
