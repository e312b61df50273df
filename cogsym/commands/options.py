"""Options of the command line, and what commands have in common."""

from __future__ import annotations

import enum
import warnings
from pathlib import Path
from typing import Any

import typer


class Schedule(enum.StrEnum):
    """How the learning rate falls."""

    cosine = "cosine"
    linear = "linear"


class Dtype(enum.StrEnum):
    """What weights are stored in and products computed in."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Loss(enum.StrEnum):
    """Which side of a pair is learned."""

    all = "all"
    target = "target"


class Stored(enum.StrEnum):
    """What weights that do not change are stored in."""

    int8 = "int8"


class Tracker(enum.StrEnum):
    """Where the numbers of a run go beside its own folder."""

    none = "none"
    wandb = "wandb"
    trackio = "trackio"
    tensorboard = "tensorboard"


class WithRecipe(enum.StrEnum):
    """The commands whose options a recipe holds."""

    train = "train"
    sweep = "sweep"


def option(text: str, *names: str, panel: str | None = None, **extra: Any) -> Any:
    """An option with its help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **extra)


_OPTIONS = {"memory_budget": "--memory", "hold_out": "--eval", "frozen_weights": "--frozen"}


def option_of(setting: str) -> str:
    """The option by which a setting is typed."""
    return _OPTIONS.get(setting, f"--{setting.replace('_', '-')}")


def key_of(option: str) -> str:
    """The key of an option in a recipe."""
    return option.partition("/")[0].lstrip("-").replace("-", "_")


def cache_dir() -> Path:
    """Where tokenised text is kept."""
    from platformdirs import user_cache_path

    return user_cache_path("cogsym")


def quiet_transformers() -> None:
    """Our own progress is enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft asks transformers for this by a name that is going away, which no user can change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
