"""Layers of which one half is ours: what their routers say, what they draw, what they keep, and the output gate."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from models.test_block import KINDS
from tiny_models import PARTLY_OWN, batch, exact_float64, tiny_model
from torch import Tensor
from training import test_trained
from training.test_frozen import KEEPS, gradients, planned, relative_errors

import cogsym
from cogsym.bench.method import saved_bytes
from cogsym.models import Block, read_block
from cogsym.models.attention import AttentionHalf
from cogsym.models.half import OwnHalf
from cogsym.models.inputs import LayerInputs, Positions
from cogsym.training.autograd import Keep, run_frozen
from cogsym.training.keep import cost

PLAN = cogsym.LayerPlan.layers(4, [0])
ROUTED = tuple(name for name, (_, extra) in PARTLY_OWN.items() if "num_experts" in extra)


def largest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(((g - want[n]).abs().max() / want[n].abs().max()).item() for n, g in got.items())


@pytest.mark.parametrize("name", ROUTED)
def test_what_routers_say_is_what_transformers_has(name: str) -> None:
    """The loss with its balancing term and its gradients, through frozen layers too, asked for by call or config."""
    model, inputs = tiny_model(name, torch.float64, router_aux_loss_coef=0.5), batch("padded-right")
    asked = {**inputs, "output_router_logits": True}
    with exact_float64():
        without, want = gradients(planned(model, PLAN), inputs), gradients(model, asked)
        assert largest(without, want) > 1e-4
        truth = model(**asked)
        for keep in KEEPS:
            cogsym.prepare(model, PLAN, keep=keep)
            assert largest(gradients(model, asked), want) < 1e-12
            assert largest(gradients(model, inputs), without) < 1e-12
        told = model.eval()(**asked)
        torch.testing.assert_close(told.router_logits, truth.router_logits, rtol=1e-12, atol=1e-12)
        model.config.output_router_logits = True
        assert largest(gradients(model, inputs), want) < 1e-12
    told = str(cogsym.explain(model))
    assert "own forward (the loss may depend on what its router says; checkpointed)" in told
    assert "head: logits by its own forward (its loss depends on what its routers say)" in told


@pytest.mark.parametrize("name", ROUTED)
def test_a_loss_without_logits_comes_in_the_same_form(name: str) -> None:
    model = tiny_model(name)
    theirs = model.train()(**batch("plain"), use_cache=False)
    ours = cogsym.prepare(model, PLAN).train()(**batch("plain"), use_cache=False)
    assert {f.name for f in fields(theirs)} - {f.name for f in fields(ours)} == {"logits"}
    assert getattr(ours, "logits", None) is None and ours.aux_loss is None and ours[0] is ours.loss
    assert not any(layer.reason.count("router says") for layer in cogsym.explain(model).layers)


@pytest.mark.parametrize("keep", KEEPS)
def test_noise_of_the_router_is_drawn_once(keep: Keep) -> None:
    """With the same seed the noise is the same, in the order of transformers; frozen layers are checkpointed whole."""
    model, inputs = tiny_model("mixtral", torch.float64, router_jitter_noise=0.3), batch("plain")

    def seeded() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(model, inputs)

    with exact_float64():
        want = (planned(model, PLAN), seeded())[1]
        other = gradients(model, inputs)
        assert largest(other, want) > 1e-6
        cogsym.prepare(model, PLAN, keep=keep)
        assert largest(seeded(), want) < 1e-12
    reports = cogsym.explain(model).layers
    assert reports[1].path == "own forward" and reports[1].reason.startswith("its own forward draws at random")
    assert reports[0].attention != "own forward"


@pytest.mark.parametrize("name", PARTLY_OWN)
@pytest.mark.parametrize("keep", KEEPS)
def test_bytes_that_frozen_layers_keep(name: str, keep: Keep) -> None:
    """A half that runs its own forward keeps nothing; ours keeps what it does elsewhere."""
    model, B, T = tiny_model(name, torch.bfloat16), 2, 16
    for layer in model.model.layers:
        layer.requires_grad_(False)
        block = read_block(layer)
        if all(isinstance(half, OwnHalf) for half in block.halves):
            continue
        calls: list[tuple[Tensor, dict[str, Any]]] = []
        hook = layer.register_forward_pre_hook(lambda _, a, k, calls=calls: calls.append((a[0], k)), with_kwargs=True)
        with torch.no_grad():
            model(torch.randint(0, 61, (B, T)), use_cache=False)
        hook.remove()
        ((x, kwargs),) = calls
        x, inputs = x.detach().requires_grad_(), LayerInputs({**kwargs, "attention_mask": None})
        inputs.positions = block.positions(inputs, x, training=True)
        held = saved_bytes(lambda block=block, x=x, inputs=inputs: run_frozen(block, x, inputs, keep))
        assert held == B * T * cost(block, keep, T, 2).bytes_per_token


def gated_block() -> Block:
    """A layer with an output gate, of the smallest shape."""
    shape = {
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    model = tiny_model("qwen3.5", torch.float64, **shape)
    block = read_block(model.model.layers[2].requires_grad_(False))
    assert isinstance(block.attention, AttentionHalf) and block.attention.gated
    return block


@pytest.mark.parametrize("keep", KEEPS)
def test_gradcheck_of_the_output_gate(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGSYM_BACKEND", "reference")
    block = gated_block()
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 4, 1, dtype=torch.float64)
    starts = torch.tensor([[0, 0, 2, 2]], dtype=torch.int32)
    blind = torch.tensor([True, False, False, False])[None, :, None, None]
    for where in (Positions(angles.cos(), angles.sin(), starts), Positions(angles.cos(), angles.sin(), None, blind)):
        torch.autograd.gradcheck(lambda x, where=where: run_frozen(block, x, LayerInputs(positions=where), keep), x)


def test_what_a_gated_half_says_of_itself() -> None:
    half = gated_block().attention
    qkv, output = half.products(3)
    assert (qkv.outputs, output.inputs) == (2 * 8 + 2 * 4, 8)
    assert half.mixing_flops(5) == 4 * 8 * 15
    assert half.kept_bytes("all", 2) - half.kept_bytes("attention", 2) == 2 * qkv.outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3.5", "gpt-oss"])
def test_error_is_at_most_twice_that_of_transformers(name: str, dtype: torch.dtype) -> None:
    """Over six random models, all keeps; every expert is asked, for rounding may choose another one."""
    theirs: dict[str, float] = {}
    ours: dict[tuple[str, Keep], float] = {}
    for seed in range(6):
        model = planned(tiny_model(name, dtype, seed, num_experts_per_tok=5))
        inputs = batch("packed", seed)
        with exact_float64():
            truth = gradients(copy.deepcopy(model).double(), inputs)
        for n, error in relative_errors(gradients(model, inputs), truth).items():
            theirs[n] = theirs.get(n, 0) + error
        for keep in KEEPS:
            got = gradients(cogsym.prepare(model, cogsym.LayerPlan.outer(4, front=1, back=1), keep=keep), inputs)
            for n, error in relative_errors(got, truth).items():
                ours[n, keep] = ours.get((n, keep), 0) + error
    granted = 6 * torch.finfo(torch.float32).eps / 2  # the last rounding of the loss, one number that chance may hit
    worse = {at: e for at, e in ours.items() if e > 2 * theirs[at[0]] + (granted if at[0] == "loss" else 0)}
    assert not worse


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_alone_get_their_gradient(kind: str) -> None:
    """Of trained layers, with frozen ones between."""
    model, inputs = tiny_model("gpt-oss", torch.float64), batch(kind)
    with exact_float64():
        want = gradients(model, inputs)
        cogsym.prepare(model, cogsym.LayerPlan.layers(4, [0, 2]))
        for n, p in model.named_parameters():
            p.requires_grad_(n.endswith("sinks") and ".layers.1." not in n and ".layers.3." not in n)
        got = gradients(model, inputs)
    assert set(got) == {"loss", "model.layers.0.self_attn.sinks", "model.layers.2.self_attn.sinks"}
    assert largest(got, {n: want[n] for n in got}) < 1e-12


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-moe"])
def test_adapters_get_the_gradients_of_plain_peft(name: str) -> None:
    """On every projection of two layers, an output gate's and the experts' among them."""
    model, inputs = test_trained.adapted(name, [0, 2]), batch("padded-right")
    plain = copy.deepcopy(model)
    with exact_float64():
        want = test_trained.gradients(plain, inputs)
        for keep in KEEPS:
            cogsym.prepare(model, cogsym.LayerPlan.layers(4, [0, 2]), keep=keep)
            got = test_trained.gradients(model, inputs)
            # peft adapts experts of other layers too, which the plan then freezes.
            assert largest(got, {n: g for n, g in want.items() if ".layers.3." not in n}) < 1e-11
