"""Prepared models in company: graphs used twice or read along the way, training that stops to generate, copies."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from served import ATTENTION, SLOWER_ATTENTION
from tiny_models import batch, exact_float64, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import cogsym
from cogsym.bench.method import saved_bytes

PLAN = cogsym.LayerPlan.outer(6, front=1, back=1)
KEEPS = ("all", "attention", "input", "nothing")


def prepared(keep: str = "nothing", **changes: Any) -> Any:
    model = tiny_model("llama", torch.float64, num_hidden_layers=6, **changes)
    return cogsym.prepare(model, PLAN, keep=keep).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return gradients(model)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_second_backward_through_the_same_graph_adds_the_same(keep: str) -> None:
    model, inputs = prepared(keep), batch("packed")
    want = step(model, inputs)
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_equal(gradients(model), {n: 2 * g for n, g in want.items()})


@pytest.mark.parametrize("keep", KEEPS)
def test_hidden_states_along_the_way_have_their_gradient(keep: str) -> None:
    """A loss on every layer's output: in the middle of a run that keeps nothing, gradients come in from the side."""
    model, inputs = prepared(keep), batch("plain")

    def loss(model: Any) -> Tensor:
        states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        return torch.stack([(i + 1) * s.square().mean() for i, s in enumerate(states)]).sum()

    with exact_float64():
        loss(model).backward()
        got = gradients(model)
        model.zero_grad()
        loss(cogsym.restore(model)).backward()
    assert_equal(got, {n: g for n, g in gradients(model).items() if n in got})


def test_two_continuations_of_one_run_are_told_apart() -> None:
    """Both layers 3 and 4 read the output of layer 2: two runs, one of them a new one."""
    model = prepared("nothing")
    layers, calls = model.model.layers, []
    hook = layers[2].register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
    )
    model(**batch("plain"), use_cache=False)
    hook.remove()
    (x, kwargs), results = calls[0], []
    for keep in ("nothing", "all"):
        cogsym.prepare(model, PLAN, keep=keep)
        leaf = x.detach().requires_grad_()
        shared = layers[2](layers[1](leaf, **kwargs), **kwargs)
        (layers[3](shared, **kwargs).square().sum() + layers[4](shared, **kwargs).sum()).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_dropped_frees_what_it_kept() -> None:
    model = prepared("nothing")
    inputs = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    gc.disable()
    try:
        model(**batch("plain"), use_cache=False)
        assert inputs[0]() is None
    finally:
        gc.enable()
        hook.remove()


def test_generating_in_the_middle_of_training_changes_nothing(tmp_path: Path) -> None:
    inputs, prompt = batch("plain"), torch.randint(0, 61, (2, 5))
    results = []
    for pause in (False, True):
        model = prepared("attention")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            step(model, inputs)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if pause:
                model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)
                model.save_pretrained(tmp_path / "model")
                model.train()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert_equal(results[1], results[0], rtol=0, atol=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert_equal(dict(loaded.named_parameters()), results[1], rtol=0, atol=0)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_copy_is_a_model_of_its_own(keep: str) -> None:
    model, inputs = prepared(keep), batch("packed")
    want, copied = step(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_equal(step(copied, inputs), want)
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("keep", KEEPS)
def test_accumulated_gradients_are_those_of_the_whole_batch(keep: str) -> None:
    model, inputs = prepared(keep), batch("packed")
    count = (inputs["labels"][:, 1:] != -100).sum()
    model(**inputs, use_cache=False, num_items_in_batch=count).loss.backward()
    want = gradients(model)
    model.zero_grad()
    for i in range(3):
        rows = {n: t[i : i + 1] for n, t in inputs.items()}
        model(**rows, use_cache=False, num_items_in_batch=count).loss.backward()
    assert_equal(gradients(model), want)


def test_a_mixture_of_experts_runs_its_own_forward_again_beside_our_attention() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model, plan = MixtralForCausalLM(config).train(), cogsym.LayerPlan.outer(3, front=1, back=1)
    results = []
    for keep in ("all", "input"):
        cogsym.prepare(model, plan, keep=keep)
        results.append(step(model, batch("plain")))
    middle = cogsym.explain(model).layers[1]
    assert middle.attention == ATTENTION and middle.mlp == "own forward"
    assert middle.reason == "; ".join([*SLOWER_ATTENTION, "its experts are chosen token by token; checkpointed"])
    assert_equal(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_bad_choices_are_refused_in_one_sentence() -> None:
    model = tiny_model("llama")
    for options, words in (
        ({"keep": "everything"}, "keep is 'everything', expected one of auto, all,"),
        ({"keep": "all", "memory_budget": 10}, "memory_budget is 10 where keep is 'all'"),
        ({"memory_budget": -1}, "expected a positive number of bytes"),
    ):
        with pytest.raises(cogsym.CogsymError, match=words):
            cogsym.prepare(model, cogsym.LayerPlan.outer(4), **options)
    cogsym.prepare(model, cogsym.LayerPlan.outer(4), keep="offload").train()
    with pytest.raises(cogsym.CogsymError, match="keep is 'offload' and the model is on cpu"):
        model(**batch("plain"), use_cache=False)


@pytest.mark.parametrize("labels", [True, False], ids=["loss", "logits"])
def test_a_training_step_has_no_cache_unless_it_asks_for_one(labels: bool) -> None:
    """transformers' config asks for one in every call; a frozen layer that fills it keeps what a trained one does."""
    model, inputs = prepared("nothing"), batch("plain")
    if not labels:
        del inputs["labels"]
    results, held = [], []
    for options in ({}, {"use_cache": False}, {"use_cache": True}):
        model.zero_grad()
        held.append(saved_bytes(partial(model, **inputs, **options), model.parameters()))
        output = model(**inputs, **options)
        (output.loss if labels else output.logits.square().mean()).backward()
        results.append(gradients(model))
        assert (output.past_key_values is None) is (options.get("use_cache") is not True)
    assert held[0] == held[1] < held[2]
    assert_equal(results[0], results[1], rtol=0, atol=0)
    assert_equal(results[2], results[1])
    model.eval()
    assert model(inputs["input_ids"]).past_key_values is not None
