"""A package beside cogsym makes its own decoder layer known, without a line changed here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import PATH
from tiny_models import batch, exact_float64, tiny_model

import cogsym
from cogsym import CogsymError
from cogsym.models import FAMILIES, UnknownLayerError, families, read_block, register_family
from cogsym.models.families.pieces import llama_like
from cogsym.registry import Registry

MODELING = '''
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm


class RiverAttention(LlamaAttention):
    pass


class RiverMLP(LlamaMLP):
    pass


class RiverRMSNorm(LlamaRMSNorm):
    pass


class RiverDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, but that each half adds half as much."""

    def forward(self, hidden_states, **kwargs):
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + 0.5 * mixed
        return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))
'''
FAMILY = """
from cogsym.models import Family, Logits
from cogsym.models.families.pieces import llama_like

RIVER = Family(
    layer="river.modeling.RiverDecoderLayer",
    causal_lm="river.modeling.RiverForCausalLM",
    read=lambda layer: llama_like(layer, residual_scale=0.5),
    logits=lambda config: Logits(),
)
"""


@pytest.fixture
def river(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package installed, and its modeling file."""
    package, info = tmp_path / "river", tmp_path / "river-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "modeling.py").write_text(MODELING)
    (package / "family.py").write_text(FAMILY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: river\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cogsym.families]\nriver.modeling.RiverDecoderLayer = river.family:RIVER\n")
    fresh = Registry[Any]("decoder layer", "cogsym.families")  # entry points are looked for once in a process
    for name in FAMILIES:
        fresh.register(name, FAMILIES[name])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", fresh)
    yield importlib.import_module("river.modeling")
    for name in [name for name in sys.modules if name.partition(".")[0] == "river"]:
        del sys.modules[name]


def river_model(modeling: Any) -> Any:
    model = tiny_model("llama", torch.float64)
    for layer in model.model.layers:
        layer.__class__ = modeling.RiverDecoderLayer
        layer.self_attn.__class__, layer.mlp.__class__ = modeling.RiverAttention, modeling.RiverMLP
        layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = modeling.RiverRMSNorm
    return model


def step(model: Any) -> dict[str, torch.Tensor]:
    loss = model.train()(**batch("padded-left"), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_package_adds_a_family(river: Any) -> None:
    plan = cogsym.LayerPlan.outer(4, front=1, back=1)
    model, plain = river_model(river), river_model(river)
    for part in plan.parts(plain):
        for p in part.parameters:
            p.requires_grad_(part.trained)
    cogsym.prepare(model, plan, keep="attention")
    assert {layer.path for layer in cogsym.explain(model).layers} == {PATH}
    with exact_float64():
        got, want = step(model), step(plain)
    assert got.keys() == want.keys()
    assert all((got[n] - want[n]).abs().max() < 1e-12 * want[n].abs().max() for n in want)


def test_without_its_entry_point_the_layer_runs_its_own_forward(river: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", FAMILIES)
    with pytest.raises(UnknownLayerError, match="RiverDecoderLayer is not a decoder layer known to cogsym"):
        read_block(river_model(river).model.layers[0])


def test_a_layer_is_registered_once() -> None:
    with pytest.raises(CogsymError, match=r"LlamaDecoderLayer' is registered already"):
        register_family("transformers.models.llama.modeling_llama.LlamaDecoderLayer", llama_like)
