"""How a run trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cogsym.errors import SettingError
from cogsym.training.keep import Memory

# What a resumed run may change: how, not what. One that needed too much memory goes on with less.
FREE_TO_CHANGE = (
    "keep", "memory_budget", "stream", "fsdp", "save_adapter", "language", "report_to", "push_to_hub",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains; the defaults suit a few hundred thousand tokens of a small model on a laptop.

    Attributes:
        length: tokens a packed row.
        batch_size: rows a forward pass.
        accumulation: forward passes an optimizer step.
        epochs: passes over the data, where `steps` does not say.
        steps: optimizer steps; None leaves it to `epochs`.
        optim: the optimizer, by a name of `transformers.training_args.OptimizerNames`.
        learning_rate: the peak.
        schedule: how the rate falls to 0 after the warm-up.
        warmup: share of the steps in which the rate rises.
        weight_decay: of the optimizer, norms and biases left out.
        max_grad_norm: gradients are scaled down to this norm.
        dtype: "bf16" keeps frozen weights and computes in bfloat16, with trained weights and their optimizer state in
            float32; "fp32" is float32 throughout; "auto" is "bf16" on GPUs and on processors that multiply bfloat16
            fast, and else keeps frozen weights as the checkpoint has them and computes in float32. Frozen weights of a
            model passed in as an object stay as they are. The model is saved in the dtype of its base.
        lora_rank: train LoRA adapters of this rank on the planned layers' projections, not their weights; None for
            full weights. The scale is 2, alpha = 2 · rank.
        save_adapter: write the adapters too, as peft does, beside the model into which they are merged.
        keep: what frozen layers hold for the backward pass, as in `cogsym.prepare`; it changes time and memory, not the
            result.
        memory_budget: bytes that they may hold, with "auto"; None is half of what is free.
        frozen_weights: "int8" holds those of frozen layers' linear maps in 8 bits, as in `cogsym.prepare`.
        stream: leave frozen layers on disk and read each when it is needed, as `cogsym.load_streamed` does.
        fsdp: leave each rank a part of the weights, by FSDP2, not all of them.
        loss: "all" the text, or "target", what follows the first field of a template.
        separator: the token between documents; None takes the tokenizer's bos or eos.
        hold_out: share of the documents of each source that are not trained on but evaluated, as "held-out"; None
            holds none out. They are drawn by chance, always the same ones.
        eval_every: steps between evaluations; None evaluates before and after.
        save_every: steps between checkpoints; the last two are kept.
        log_every: steps between the lines of metrics.jsonl.
        seed: of shuffling, dropout and LoRA's initial weights.
        language: code of the text's language, such as "sw", for the model's card.
        report_to: where the numbers go beside metrics.jsonl, by Trainer's own callback; TensorBoard's are in `runs`.
        push_to_hub: the repository of the hub that the model is uploaded to at the end; None uploads nothing.
    """

    length: int = 512
    batch_size: int = 4
    accumulation: int = 1
    epochs: float = 1.0
    steps: int | None = None
    optim: str = "adamw_torch_fused"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    lora_rank: int | None = None
    save_adapter: bool = False
    keep: str = "auto"
    memory_budget: int | None = None
    frozen_weights: Literal["int8"] | None = None
    stream: bool = False
    fsdp: bool = False
    loss: Literal["all", "target"] = "all"
    separator: str | None = None
    hold_out: float | None = None
    eval_every: int | None = None
    save_every: int = 200
    log_every: int = 10
    seed: int = 0
    language: str | None = None
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "length",
            "batch_size",
            "accumulation",
            "epochs",
            "learning_rate",
            "save_every",
            "log_every",
            "max_grad_norm",
        ):
            if not getattr(self, name) > 0:
                raise SettingError(name, f"is {getattr(self, name)}, expected a number above 0.")
        for name in ("steps", "lora_rank", "eval_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingError(name, f"is {getattr(self, name)}, expected a whole number above 0.")
        for name, choices in (
            ("schedule", ("cosine", "linear")),
            ("dtype", ("auto", "bf16", "fp32")),
            ("loss", ("all", "target")),
            ("report_to", ("none", "wandb", "trackio", "tensorboard")),
        ):
            if getattr(self, name) not in choices:
                expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise SettingError(name, f"is {getattr(self, name)!r}, expected {expected}.")
        if self.frozen_weights not in (None, "int8"):
            raise SettingError("frozen_weights", f"is {self.frozen_weights!r}, expected int8, or none at all.")
        if self.save_adapter and self.lora_rank is None:
            raise SettingError("save_adapter", "is set and there are no adapters to save; set lora_rank (--lora-rank).")
        if self.fsdp and (self.stream or self.frozen_weights):
            raise SettingError(
                "fsdp", "is set, which shards weights in memory as they are; leave stream and frozen_weights out."
            )
        if not 0 <= self.warmup < 1:
            raise SettingError("warmup", f"is {self.warmup}, expected a share of the steps, from 0 to less than 1.")
        if not 0 <= self.seed < 2**32:
            raise SettingError("seed", f"is {self.seed}, expected a whole number from 0 to {2**32 - 1}.")
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise SettingError("hold_out", f"is {self.hold_out}, expected a share of the text between 0 and 1.")
        if self.language is not None and not re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", self.language):
            raise SettingError("language", f"is {self.language!r}, expected a code of ISO 639, such as sw or kin.")
        Memory(self.keep, self.memory_budget)  # raises
