"""A prepared model computes what transformers computes: logits, and the gradient of every parameter."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from served import ATTENTION, SLOWER_ATTENTION
from tiny_models import EVERY, FURTHER, PARTLY_OWN, VARIANTS, batch, exact_float64, tiny_model

import cogsym
from cogsym import ops
from cogsym.models import read_block
from cogsym.models.inputs import LayerInputs, Positions, QueryScale

KINDS = ("plain", "padded-right", "padded-left", "packed")


def run(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (0 where a token is padding: its value means nothing) and gradients."""
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    logits = out.logits.detach()
    if "attention_mask" in inputs:
        logits = logits * inputs["attention_mask"][..., None]
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest_errors(
    got: tuple[torch.Tensor, dict[str, torch.Tensor]], want: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Largest difference of the logits and of each gradient, relative to the largest true value."""
    pairs = {"logits": (got[0], want[0])} | {name: (g, want[1][name]) for name, g in got[1].items()}
    return {n: ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for n, (a, b) in pairs.items()}


def relative_errors(
    got: tuple[torch.Tensor, dict[str, torch.Tensor]], want: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Norm of the difference over the norm of the truth, of the logits and of each gradient."""
    pairs = {"logits": (got[0], want[0])} | {name: (g, want[1][name]) for name, g in got[1].items()}
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, (a, b) in pairs.items()}


def float64_errors(variant: str, kind: str) -> dict[str, float]:
    """`largest_errors` of a model every layer of which is trained."""
    model, inputs = tiny_model(variant, torch.float64), batch(kind)
    with exact_float64():
        want = run(model, inputs)
        got = run(cogsym.prepare(model, cogsym.LayerPlan.all(4)), inputs)
    assert got[1].keys() == want[1].keys()
    return largest_errors(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", EVERY)
def test_float64_agrees_to_rounding(variant: str, kind: str) -> None:
    errors = float64_errors(variant, kind)
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_is_at_most_twice_that_of_transformers(variant: str, dtype: torch.dtype) -> None:
    """Over six random models: in one alone, the error of a small gradient is mostly chance on either side."""
    theirs: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    for seed in range(6):
        model, inputs = tiny_model(variant, dtype, seed), batch("packed", seed)
        with exact_float64():
            truth = run(copy.deepcopy(model).double(), inputs)
        theirs.update(relative_errors(run(model, inputs), truth))
        ours.update(relative_errors(run(cogsym.prepare(model, cogsym.LayerPlan.all(4)), inputs), truth))
    worse = {name: (ours[name], theirs[name]) for name in ours if ours[name] > 2 * theirs[name]}
    assert not worse


@pytest.mark.parametrize(
    "plan",
    [
        cogsym.LayerPlan.outer(4, front=1, back=1),
        cogsym.LayerPlan.first(4, 1),
        cogsym.LayerPlan.last(4, 1),
        cogsym.LayerPlan.layers(4, [2], final_norm=True),
        cogsym.LayerPlan.layers(4, [], embeddings=True),
        cogsym.LayerPlan.layers(4, [], head=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3", "mistral-window"])
def test_planned_parameters_alone_get_their_right_gradient(variant: str, plan: cogsym.LayerPlan) -> None:
    model = tiny_model(variant, torch.float64)
    inputs = batch("padded-left")
    with exact_float64():
        want = run(model, inputs)
        cogsym.prepare(model, plan)
        got = run(model, inputs)
    parts = {part.name: part for part in plan.parts(model)}
    trained = {id(p) for part in parts.values() if part.trained for p in part.parameters}
    assert got[1].keys() == {n for n, p in model.named_parameters() if id(p) in trained}
    errors = largest_errors(got, want)
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-windows", "qwen3"])
def test_packed_documents_do_not_see_each_other(variant: str) -> None:
    model = cogsym.prepare(tiny_model(variant, torch.float64), cogsym.LayerPlan.outer(4))
    inputs = batch("packed")
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row in range(len(ids)):
            starts = [*torch.nonzero(positions[row] == 0).flatten().tolist(), ids.shape[1]]
            for a, b in itertools.pairwise(starts):
                alone = model(input_ids=ids[row : row + 1, a:b], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, a:b], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "variant"),
    [
        *itertools.product(("sdpa", "eager"), ("llama", "mistral-window", "qwen2-windows", "qwen3")),
        *itertools.product((None,), FURTHER | PARTLY_OWN),  # the model's own choice: some have no other
    ],
)
def test_generation_with_a_cache_gives_the_same_tokens(variant: str, implementation: str | None) -> None:
    model = tiny_model(variant, attn_implementation=implementation)
    prompt = batch("plain")["input_ids"][:, :7]
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(prompt)
    want = model.generate(prompt, attention_mask=mask, **settings)
    got = cogsym.prepare(model, cogsym.LayerPlan.outer(4)).generate(prompt, attention_mask=mask, **settings)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(got.sequences, want.sequences)


def storages(model: Any) -> dict[int, int]:
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


def test_no_weight_is_held_twice() -> None:
    """Weights of a frozen layer lie beside each other; trained ones, and all of a restored model, stand alone."""
    model = tiny_model("qwen3")
    values = {n: p.clone() for n, p in model.state_dict().items()}
    before, trained = storages(model), {n: p.data_ptr() for n, p in model.model.layers[0].named_parameters()}
    cogsym.prepare(model, cogsym.LayerPlan.outer(4))
    assert len(storages(model)) < len(before) and sum(storages(model).values()) == sum(before.values())
    assert {n: p.data_ptr() for n, p in model.model.layers[0].named_parameters()} == trained
    cogsym.restore(model)
    assert len(storages(model)) == len(before) and sum(storages(model).values()) == sum(before.values())
    assert all(torch.equal(p, values[n]) for n, p in model.state_dict().items())


def test_a_layer_that_is_not_known_runs_its_own_forward() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    inputs = batch("plain")
    want = run(model, inputs)[0]
    cogsym.prepare(model, cogsym.LayerPlan.outer(4))
    layers = cogsym.explain(model).layers
    assert {layer.path for layer in layers} == {"own forward"}
    assert "GPTNeoXLayer is not a decoder layer known to cogsym" in layers[0].reason
    assert torch.equal(run(model, inputs)[0], want)
    assert not any(p.requires_grad for p in model.gpt_neox.layers[2].parameters())
    assert all(p.requires_grad for p in model.gpt_neox.layers[0].parameters())


def test_an_unknown_activation_runs_the_mlp_s_own_forward_beside_our_attention() -> None:
    model, inputs = tiny_model("llama", torch.float64, hidden_act="tanh"), batch("padded-left")
    with exact_float64():
        want = run(model, inputs)
        cogsym.prepare(model, cogsym.LayerPlan.outer(4, front=1, back=1))
        report = cogsym.explain(model).layers[1]
        assert report.attention == ATTENTION and report.mlp == "own forward"
        assert report.reason == "; ".join([*SLOWER_ATTENTION, "the activation Tanh has no kernel; checkpointed"])
        got = run(model, inputs)
    assert max(largest_errors(got, (want[0], {n: want[1][n] for n in got[1]})).values()) < 1e-12


@pytest.mark.parametrize("one_norm", [True, False])
def test_halves_side_by_side_read_the_block_s_input(one_norm: bool) -> None:
    """A norm each, as GPT-NeoX has them, or one for both: every way of computing them, in float64."""
    layer = tiny_model("stablelm", torch.float64).model.layers[0].requires_grad_(False)
    block = read_block(layer)
    norm = block.attention.norm if one_norm else block.mlp.norm
    block = replace(block, mlp=replace(block.mlp, norm=norm), parallel=True)
    x = torch.randn(2, 7, 36, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 7, 2, dtype=torch.float64)
    where = Positions(angles.cos(), angles.sin())
    inputs = LayerInputs({"position_embeddings": (where.cos.repeat(1, 1, 2), where.sin.repeat(1, 1, 2))})
    n = layer.input_layernorm(x)
    m = n if one_norm else layer.post_attention_layernorm(x)
    attended = layer.self_attn(n, position_embeddings=inputs.position_embeddings)[0]
    want = x + attended + layer.mlp(m)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(want, x, dy)
    inputs.positions = where
    torch.testing.assert_close(block.forward(x, inputs), want, rtol=0, atol=1e-12)
    with torch.no_grad():
        for dial in ("all", "attention", "input"):
            y, kept = block.run(x, inputs, dial)
            torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
            torch.testing.assert_close(block.input_gradient(dy, kept, inputs), dx, rtol=0, atol=1e-12)
        attend = lambda q, k, v: ops.attention(q, k, v, block.attention.options)[0]  # noqa: E731
        for both, expected in ((True, want), (False, x + attended)):
            stream = x.clone()
            block.add_attention(stream, where.cos, where.sin, attend, both)
            torch.testing.assert_close(stream, expected, rtol=0, atol=1e-12)
            # The last query sees every key, as attention of one to all does.
            last = torch.tensor([6])
            some = block.attention_added_at(x, last, where.cos, where.sin, attend_to_all, both)
            torch.testing.assert_close(some, expected[:, last], rtol=0, atol=1e-12)
        stream = x.clone()
        block.add_mlp(stream)
        torch.testing.assert_close(stream, x + layer.mlp(m), rtol=0, atol=1e-12)


def attend_to_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of queries that see every key, [B, P, H, d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def test_queries_grow_only_where_their_positions_ask() -> None:
    scale = QueryScale(beta=0.5, length=5)
    positions = torch.arange(12)[None]
    factors = scale(positions)
    assert factors.shape == (1, 12, 1, 1) and torch.all(factors[:, :5] == 1) and torch.all(factors[:, 5:] > 1)
    torch.testing.assert_close(factors[0, 11, 0, 0], torch.tensor(1 + 0.5 * math.log(3)))
    assert torch.equal(scale.where_needed(positions), factors)
    assert scale.where_needed(positions[:, :5]) is None
