"""What a run trains, from what a user gives: a model in memory, a folder or id, frozen layers left on disk or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cogsym.errors import CogsymError
from cogsym.memory import give_back_freed_memory
from cogsym.models.loading import checkpoint_dtype, load_config, load_model, load_tokenizer
from cogsym.plan import LayerPlan
from cogsym.training.settings import TrainSettings
from cogsym.training.streamed import load_streamed


def load(
    model: str | Path | PreTrainedModel, tokenizer: Any, plan: LayerPlan | None, settings: TrainSettings, products: str
) -> tuple[Any, Any, dict[str, torch.dtype]]:
    """The model and its tokenizer, from a name or as they are, and the dtypes that its parameters are saved in.

    Args:
        model: a folder, a hub id, or a loaded model.
        tokenizer: the model's own where `model` is a name; required for a loaded model.
        plan: which layers are trained; the outermost quarter by default.
        settings: of the run.
        products: what it computes in, "bfloat16" or "float32".

    Raises:
        CogsymError: they do not load; or frozen layers are to stay on disk, and cannot.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise CogsymError("train was given a loaded model without its tokenizer; pass tokenizer=.")
        if settings.stream:
            raise CogsymError(
                "Layers are streamed from a folder, and train was given a model in memory; name a folder, or give it "
                "the model that cogsym.load_streamed gives."
            )
        if settings.fsdp:
            raise CogsymError(
                "The ranks of a run with fsdp load the model from a folder, to save it whole, and train was given a "
                "model in memory; name the folder."
            )
        return model, tokenizer, {n: p.dtype for n, p in model.named_parameters()}
    half = None if settings.dtype == "auto" and products == "float32" else torch.bfloat16
    loaded, saved = torch.float32 if settings.dtype == "fp32" else half, checkpoint_dtype(model)
    if settings.stream:
        give_back_freed_memory()
        layers = load_config(model).get_text_config().num_hidden_layers
        network = load_streamed(model, plan or LayerPlan.outer(layers), loaded)
    else:
        network = load_model(model, loaded)
    # Where transformers keeps a parameter in another precision than asked, it does so in the base too.
    dtypes = {n: saved if p.dtype == loaded else p.dtype for n, p in network.named_parameters()}
    return network, tokenizer or load_tokenizer(model), dtypes
