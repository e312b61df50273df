"""Before a sweep writes anything, the model with all its layers is held against its own forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import OWN, own_model
from tiny_models import EVERY, tiny_model
from torch import Tensor

from cogsym import CogsymError, SweepSettings
from cogsym.decoder import layers_of
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.models.mlp import MlpHalf
from cogsym.sweeps.engine.agreement import ROUNDING, check_agreement
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers

TOKENS = tuple(itertools.islice(itertools.cycle((5, 9, 2, 41, 7, 11, 3)), 60))


def check(model: Any) -> None:
    layers = ResidentLayers(model.eval())
    try:
        check_agreement(Engine(layers), SweepHead(model), TOKENS, "line 1 of text")
    finally:
        layers.close()


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_what_it_is(name: str) -> None:
    implementation = (model := tiny_model(name, initializer_range=0.2)).config._attn_implementation
    check(model)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", OWN)
def test_and_every_model_on_its_own_forward(name: str) -> None:
    check(own_model(name))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rounding_alone_is_far_below_the_bound(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDING, dtype, ROUNDING[dtype] / 2)
    check(tiny_model("llama", dtype, initializer_range=0.2))


def steer(module: Any, args: Any, output: Tensor) -> Tensor:
    return output + 0.5


def steer_outcome(module: Any, args: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * torch.linspace(0, 2, output.last_hidden_state.shape[-1])
    return output


@pytest.mark.parametrize("stream", [False, True])
def test_arithmetic_that_is_not_the_models_stops_the_sweep(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Before there is a row, and on resume."""
    settings, message = (
        SweepSettings(stream=stream),
        r"on line \d+ of text log-probabilities differ from .* float32, so",
    )
    sweep("input", tasks[:1], settings=settings)
    add = MlpHalf.add
    monkeypatch.setattr(MlpHalf, "add", lambda self, x, projected: add(self, x, 1.2 * projected))
    with pytest.raises(CogsymError, match=message):
        sweep("input,output", tasks[:1], settings=settings, resume=True)
    with pytest.raises(CogsymError, match=message):
        sweep("input", tasks[:1], settings=settings, out=tmp_path / "other")
    assert not (tmp_path / "other" / "results").exists()


def test_a_hook_on_the_decoder_stops_the_sweep(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path
) -> None:
    """Which acts behind the layers, where a sweep does not call it; on a layer it fires."""
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    hook = model.model.embed_tokens.register_forward_hook(steer)
    told = sweep("input", tasks[:1], model, tmp_path / "steered", tokenizer=tokenizer)
    hook.remove()
    plain = sweep("input", tasks[:1], model, tmp_path / "plain", tokenizer=tokenizer)
    assert abs(told["value"] - plain["value"]).max() > 0.01
    model.model.register_forward_hook(steer_outcome)
    with pytest.raises(CogsymError, match="take off what acts on the model outside its layers"):
        sweep("input", tasks[:1], model, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_sweep_tells_what_runs_its_own_forward(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path
) -> None:
    """Before it starts, in the words of `explain`."""
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    sweep("input", tasks[:1], model, tmp_path / "none", tokenizer=tokenizer)
    assert "own forward" not in sweep.said  # type: ignore[attr-defined]
    layers_of(model)[1].mlp.register_forward_hook(steer)
    layers_of(model)[2].mlp.register_forward_hook(steer)
    sweep("input", tasks[:1], model, tokenizer=tokenizer)
    said = sweep.said  # type: ignore[attr-defined]
    assert "layers 1-2: attention " in said and ", MLP own forward (a hook on LlamaMLP must fire)\n" in said
    layers_of(model)[3].register_forward_hook(lambda module, args, output: None)
    sweep("output", tasks[:1], model, tmp_path / "whole", tokenizer=tokenizer)
    said = sweep.said  # type: ignore[attr-defined]
    assert "layers 0-3: own forward, a state at a time (a hook on LlamaDecoderLayer must fire)\n" in said
