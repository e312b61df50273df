"""The optimizer of a run, by the name that transformers' Trainer has for it."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from cogsym.errors import SettingError
from cogsym.registry import unknown
from cogsym.training.checkpoint import optimizer_state
from cogsym.training.settings import TrainSettings

_SHARDED = ("adamw_torch_fused", "adamw_torch")  # whose states are parts of the parameters' shapes
_SIZE = 256  # of the weight it is tried on: larger than those whose states stay in 32 bits


def check_optimizer(settings: TrainSettings) -> int:
    """Refuse, before anything is loaded, an optimizer that a run could not use: one step is tried.

    Returns:
        Bytes of its state for each parameter.

    Raises:
        SettingError: Trainer has none of this name, its package is not installed, it does not run on this device, or a
            run could not check its gradients or write its state into a checkpoint.
    """
    name, names = settings.optim, [known.value for known in OptimizerNames]
    if name not in names:
        raise unknown("optimizer (--optim)", name, names)
    if settings.fsdp and name not in _SHARDED:
        raise SettingError("optim", f"is {name} with --fsdp, which is for {' and '.join(_SHARDED)}; take one of them.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = nn.utils.skip_init(nn.Linear, _SIZE, _SIZE, bias=False, device=device)
    layer.weight.data.zero_()
    try:
        optimizer = _made(settings, layer)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    except SettingError:
        raise
    except Exception as error:  # each package has its own
        words = " ".join(str(error).split())
        install = re.search(r"pip install [^`]+[^`.]", words)
        if isinstance(error, (ImportError, ValueError)) and install:
            raise SettingError("optim", f"is {name}, which is not installed; `{install[0]}` does that.") from error
        raise SettingError("optim", f"is {name}, which does not run here ({words}); choose another one.") from error
    tensors, values = optimizer_state(optimizer)
    try:
        json.dumps([values, optimizer.state_dict()["param_groups"]])
    except TypeError as error:
        raise SettingError(
            "optim",
            f"is {name}, whose state is not of plain tensors and numbers, as a checkpoint needs it ({error}); choose "
            "another one.",
        ) from error
    return round(sum(tensor.nbytes for tensor in tensors.values()) / layer.weight.numel())


def _made(settings: TrainSettings, layer: nn.Module) -> Any:
    """The optimizer of one layer, as Trainer makes that of a model."""
    # Not initialised, only its defaults: that would reset accelerate's state below another run of this process.
    arguments: Any = object.__new__(TrainingArguments)
    arguments.optim, arguments.optim_target_modules = OptimizerNames(settings.optim), ".*"
    model: Any = nn.Sequential(layer)
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if "model" in options or "optimizer_dict" in options:
        raise SettingError(
            "optim",
            f"is {settings.optim}, which steps within the backward pass, where gradients are not whole yet; choose "
            "another one.",
        )
    optimizer = cls(options.pop("params", [*layer.parameters()]), **options)
    if callable(getattr(optimizer, "eval", None)):
        raise SettingError(
            "optim",
            f"is {settings.optim}, whose weights in training are not those of the model, which a run does not expect; "
            "choose another one.",
        )
    return optimizer
