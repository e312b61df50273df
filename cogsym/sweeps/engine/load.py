"""The layers of a sweep from what a user gives: a model in memory, a folder or id, a base beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cogsym.errors import CogsymError
from cogsym.memory import free_bytes
from cogsym.models.attachment import RECORD
from cogsym.models.loading import check_model_folder, load_config, load_model, load_tokenizer
from cogsym.models.precision import products_sentence, should_widen
from cogsym.sweeps.engine.weights import LayerSource, ResidentLayers, StreamedLayers


def num_layers(model: Any) -> int:
    """How many decoder layers a model has, before its weights are loaded.

    Raises:
        CogsymError: there is no model, or none whose layers a sweep can choose from.
    """
    config = load_config(model) if isinstance(model, (str, Path)) else model.config
    return int(config.get_text_config().num_hidden_layers)


def load_layers(
    model: Any,
    base: Any,
    tokenizer: Any,
    stream: bool | None,
    dtype: torch.dtype | None,
    widened: bool | None,
    weights: str | None,
    needs_base: bool,
    say: Callable[[str], None],
) -> LayerSource:
    """The model in memory, or streamed where that is asked for or it does not fit.

    Args:
        model: a folder or id, or a model; peft's wrapper has its adapters merged, and its base is the model without.
        base: the same, or None; only read where a configuration reverts.
        tokenizer: the model's.
        stream: None does so where the model does not fit.
        dtype: of the weights; None takes the checkpoint's own.
        widened: multiply weights of 16 bits in float32; None does so where the processor is faster with it and no
            `dtype` is asked for.
        weights: "int8" quantises the layers' linear maps; None leaves them.
        needs_base: some configuration has layers of the base.
        say: told what the user did not ask for.

    Raises:
        CogsymError: no model, a base that does not fit it, or one that is missing.
    """
    adapted = hasattr(model, "peft_config")
    if needs_base and base is None and not adapted:
        raise CogsymError("A configuration reverts layers but there is no base checkpoint; name one with base.")
    if base is not None and not needs_base:
        say("No configuration reverts a layer: the base checkpoint is left aside.")
        base = None
    if isinstance(base, (str, Path)):
        _check_vocabulary(tokenizer, base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(model, (str, Path)):
        if stream is None:
            size = _checkpoint_bytes(model) + (_checkpoint_bytes(base) if base is not None else 0)
            stream = size > free_bytes(torch.device(device))
            if stream:
                say("The model does not fit into memory: its layers are read one at a time.")
        if stream:
            if base is not None and not isinstance(base, (str, Path)):
                raise CogsymError("A streamed sweep takes its base from a folder too; save it with save_pretrained.")
            streamed = StreamedLayers(model, base, dtype, device, weights == "int8")
            _widen(streamed, dtype, widened, say)
            return streamed
        model = load_model(model, dtype).to(device)
    elif weights is not None:
        raise CogsymError(
            "Weights in int8 are made of those in a folder, and the sweep was given a model in memory; name a folder."
        )
    elif stream:
        raise CogsymError(
            "Layers are streamed from a folder, and the sweep was given a model in memory; name a folder."
        )
    if any(hasattr(each, RECORD) for each in (model, base)):
        raise CogsymError("The model is prepared for training; call cogsym.restore(model) before a sweep.")
    for each in (model, base):
        _check_in_memory(each)
    if adapted:
        if needs_base and base is None:
            base = copy.deepcopy(model).unload()
        model = copy.deepcopy(model).merge_and_unload()
    if isinstance(base, (str, Path)):
        base = load_model(base, model.dtype).to(model.device)
    layers = ResidentLayers(model, base, weights == "int8")
    _widen(layers, dtype, widened, say)
    return layers


def _widen(layers: LayerSource, dtype: torch.dtype | None, widened: bool | None, say: Callable[[str], None]) -> None:
    if widened is None:
        stored = layers.model.get_input_embeddings().weight.dtype
        widened = dtype is None and should_widen(stored, layers.device)
    if widened:
        layers.widen()
    if sentence := products_sentence(layers.model, layers.device):
        say(sentence)


def _check_in_memory(model: Any) -> None:
    """Refuse a model of which a part is elsewhere."""
    if not isinstance(model, torch.nn.Module):
        return
    devices = {p.device for p in model.parameters()}
    if torch.device("meta") in devices or len(devices) > 1:
        where = "not in memory" if torch.device("meta") in devices else "on several devices"
        raise CogsymError(
            f"Weights of the {type(model).__name__} are {where}, as accelerate's offloading leaves them; give the "
            "sweep the model's folder, of which it reads a layer at a time where the whole does not fit."
        )


def _checkpoint_bytes(name: str | Path) -> int:
    folder = check_model_folder(name)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


def _check_vocabulary(tokenizer: Any, base: str | Path) -> None:
    """A model adapted to a language may have tokens that its base has not, but none that mean something else."""
    folder = check_model_folder(base)
    if folder and not (folder / "tokenizer.json").exists():
        return
    ours = tokenizer.get_vocab()
    for token, number in load_tokenizer(base).get_vocab().items():
        if ours.get(token) != number:
            raise CogsymError(
                f"The base checkpoint has another tokenizer: its token {token!r} has the id {number}, expected "
                f"{ours.get(token)}, as in the model; give the checkpoint that the model was adapted from."
            )
