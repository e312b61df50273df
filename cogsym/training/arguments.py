"""A run's settings as transformers' Trainer takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from cogsym.errors import SettingError
from cogsym.training.settings import TrainSettings


def training_arguments(
    out: Path, settings: TrainSettings, batch: tuple[int, int], evaluates: bool, fresh: bool
) -> TrainingArguments:
    """Trainer's arguments.

    Args:
        out: the run's folder, below which TensorBoard's `runs` lie.
        settings: of the run.
        batch: (rows a forward pass, such passes a step).
        evaluates: whether there is held-out text.
        fresh: whether the run begins at step 0.
    """
    return TrainingArguments(
        output_dir=str(out),
        run_name=out.resolve().name,
        per_device_train_batch_size=batch[0],
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=batch[1],
        ddp_find_unused_parameters=False,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        optim=settings.optim,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # below 1: a share of the steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every or 10**9,
        eval_on_start=evaluates and fresh,
        save_steps=settings.save_every,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=settings.report_to,
    )


def check_tracker(settings: TrainSettings) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        SettingError: that.
    """
    name = settings.report_to
    if name != "none" and name not in get_available_reporting_integrations():
        raise SettingError("report_to", f"is {name}, which is not installed; `pip install {name}` does that.")
