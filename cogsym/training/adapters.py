"""LoRA adapters on the planned layers."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from cogsym.decoder import layers_of
from cogsym.errors import CogsymError
from cogsym.plan import LayerPlan


def with_adapters(model: Any, plan: LayerPlan, rank: int | None) -> Any:
    """peft's wrapper around the model, with adapters on every linear map of trained layers; without a rank the model.

    Raises:
        CogsymError: peft refuses them.
    """
    if rank is None:
        return model
    linear = [
        (n.rpartition(".")[2], m) for n, m in layers_of(model).named_modules() if isinstance(m, (nn.Linear, Conv1D))
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({name for name, _ in linear}),
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in linear),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, plan.peft_config(config))
    except ValueError as error:
        raise CogsymError(f"LoRA does not fit {type(model).__name__} ({error}); train whole layers.") from error
