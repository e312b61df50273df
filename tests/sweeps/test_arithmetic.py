"""A sweep of weights of 16 bits with arithmetic in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sweeps.runs import assert_same_rows, by_row
from torch import nn
from transformers import AutoModelForCausalLM

import cogsym
from cogsym.decoder import layers_of
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.ops.int8_linear import dequantised, quantise
from cogsym.sweeps.results.store import read_key


@pytest.mark.parametrize("stream", [False, True])
def test_a_sweep_by_default_is_that_in_float32(
    sweep: Callable[..., Any],
    tasks: list[dict[str, Any]],
    bf16_checkpoint: Path,
    tmp_path: Path,
    slow_halves: Callable[[bool], None],
    stream: bool,
) -> None:
    """Values, resumed on another machine too, and the weights' digest is that of the file."""
    base = bf16_checkpoint
    settings = cogsym.SweepSettings(stream=stream)
    sweep("input", tasks[:2], base, tmp_path / "auto", settings=settings)
    assert "bfloat16 weights, float32 products: " in sweep.said
    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(wide)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (wide / name).write_bytes((base / name).read_bytes())
    sweep("input", tasks[:2], wide, tmp_path / "fp32")
    values = [
        pd.concat(map(pd.read_parquet, sorted((tmp_path / name / "results").rglob("*.parquet"))))["value"].to_numpy()
        for name in ("auto", "fp32")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-5)
    key = read_key(tmp_path / "auto")
    assert key["products"] == "float32"
    slow_halves(False)
    sweep("input", tasks, base, tmp_path / "auto", settings=settings, resume=True)
    assert read_key(tmp_path / "auto")["products"] == "float32"
    sweep("input", tasks[:1], base, tmp_path / "native", settings=settings)
    assert read_key(tmp_path / "native")["revision"] == key["revision"]
    assert read_key(tmp_path / "native")["products"] is None


@pytest.mark.usefixtures("slow_halves")
def test_a_sweep_leaves_a_model_in_memory_as_it_was(
    sweep: Callable[..., Any], tasks: list[dict[str, Any]], bf16_checkpoint: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype="auto")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    sweep("input", tasks[:1], model, tokenizer=load_tokenizer(bf16_checkpoint))
    for name, t in model.state_dict().items():
        assert t.dtype == before[name].dtype and torch.equal(t, before[name])
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_in_int8_are_recorded_and_kept(
    sweep: Callable[..., Any], tasks: list[dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    """The rows are those of a checkpoint with the weights that the integers stand for, in memory and streamed."""
    asked = cogsym.SweepSettings(weights="int8", dtype=torch.float32)
    sweep("input", tasks[:1], model_folder, tmp_path / "int8", settings=asked)
    plain = cogsym.SweepSettings(dtype=torch.float32)
    sweep("input", tasks[:2], model_folder, tmp_path / "int8", settings=plain, resume=True)
    sweep("input", tasks[:2], model_folder, tmp_path / "streamed", settings=replace(asked, stream=True))
    assert_same_rows(tmp_path / "int8", tmp_path / "streamed")

    model = load_model(model_folder, torch.float32)
    for module in layers_of(model).modules():
        if isinstance(module, nn.Linear):
            module.weight.data = dequantised(*quantise(module.weight), torch.float32)
    model.save_pretrained(tmp_path / "rounded")
    load_tokenizer(model_folder).save_pretrained(tmp_path / "rounded")
    sweep("input", tasks[:2], tmp_path / "rounded", tmp_path / "rounded-out", settings=plain)
    values = [by_row(tmp_path / name)["value"].to_numpy() for name in ("int8", "rounded-out")]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)

    sweep("input", tasks[:2], model_folder, tmp_path / "whole", settings=plain)
    key, whole = (read_key(tmp_path / name) for name in ("int8", "whole"))
    assert key["weights"] == "int8" and "weights" not in whole and key["revision"] == whole["revision"]
    with pytest.raises(cogsym.CogsymError, match="weights"):
        sweep("input", tasks[:2], model_folder, tmp_path / "whole", settings=asked, resume=True)
    with pytest.raises(cogsym.CogsymError, match="name a folder"):
        sweep("input", tasks[:1], model, tokenizer=load_tokenizer(model_folder), settings=asked)
