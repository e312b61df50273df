"""Frozen layers: right gradients whatever they keep, and exactly the promised bytes and FLOPs."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import EVERY, FURTHER, PARTLY_OWN, VARIANTS, batch, exact_float64, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cogsym
from cogsym.bench.method import saved_bytes
from cogsym.models import Block, read_block
from cogsym.models.inputs import LayerInputs, Positions
from cogsym.training.autograd import Keep, run_frozen
from cogsym.training.explain import OWN
from cogsym.training.keep import choose, cost, run_flops

KEEPS: tuple[Keep, ...] = ("all", "attention", "input", "nothing")
KINDS = ("plain", "padded-right", "padded-left", "packed")
PLAN = cogsym.LayerPlan.outer(4, front=1, back=1)


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and every gradient of one training step."""
    model.zero_grad()
    loss = model.train()(**inputs, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def planned(model: Any, plan: cogsym.LayerPlan = PLAN) -> Any:
    """transformers' own model with the same parameters frozen."""
    for part in plan.parts(model):
        for p in part.parameters:
            p.requires_grad_(part.trained)
    return model


def relative_errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((g.double() - truth[n]).norm() / truth[n].norm()).item() for n, g in got.items()}


def float64_errors(variant: str, kind: str) -> dict[str, dict[str, float]]:
    """The largest difference of the loss and of each gradient, relative to the largest true value, for each choice."""
    model, inputs = tiny_model(variant, torch.float64), batch(kind)
    errors: dict[str, dict[str, float]] = {}
    with exact_float64():
        want = gradients(planned(model), inputs)
        for keep in KEEPS:
            cogsym.prepare(model, PLAN, keep=keep)
            got = gradients(model, inputs)
            kept = [layer.keep for layer in cogsym.explain(model).layers if layer.path != OWN]
            assert set(kept) <= {keep, ""} and (variant in PARTLY_OWN or kept == ["", keep, keep, ""])
            assert got.keys() == want.keys()
            errors[keep] = {n: ((g - want[n]).abs().max() / want[n].abs().max()).item() for n, g in got.items()}
    return errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", EVERY)
def test_every_choice_gives_the_gradients_of_transformers(variant: str, kind: str) -> None:
    errors = float64_errors(variant, kind)
    assert max(max(of_keep.values()) for of_keep in errors.values()) < 1e-12, errors


@pytest.mark.parametrize("variant", ["seed_oss", "starcoder2", "stablelm-parallel", "phi3"])
def test_what_is_dropped_from_the_stream_is_dropped_by_the_layer_itself(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, by the same draws; in evaluation nothing is, and the halves are ours."""
    rates = dict.fromkeys(("residual_dropout", "hidden_dropout", "resid_pdrop"), 0.3)
    model, inputs = tiny_model(variant, torch.float64, **rates), batch("padded-left")
    with exact_float64():
        torch.manual_seed(0)
        want = gradients(planned(model), inputs)
        cogsym.prepare(model, PLAN)
        report = cogsym.explain(model).layers[1]
        assert report.path == OWN and "it drops out 30% of what it adds to the stream" in report.reason
        torch.manual_seed(0)
        assert max(relative_errors(gradients(model, inputs), want).values()) < 1e-12
        logits = copy.deepcopy(cogsym.restore(model)).eval()(**inputs).logits
        cogsym.prepare(model, PLAN).eval()
        taken: list[Block] = []
        run = Block.run
        monkeypatch.setattr(Block, "run", lambda self, *args: taken.append(self) or run(self, *args))
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, logits, rtol=0, atol=1e-12)
    assert len(taken) == 2


LOW_PRECISION: list[tuple[str, Any]] = [
    *((variant, dtype) for variant in VARIANTS for dtype in (torch.float32, torch.bfloat16, "autocast")),
    *((variant, torch.bfloat16) for variant in FURTHER),
]


@pytest.mark.parametrize(("variant", "dtype"), LOW_PRECISION, ids=str)
def test_error_is_at_most_twice_that_of_transformers(variant: str, dtype: Any) -> None:
    """Over six random models: in one alone, the error of a small gradient is mostly chance on either side."""
    keeps: tuple[Keep, ...] = KEEPS if variant in VARIANTS else ("input",)
    theirs: dict[str, Counter[str]] = {keep: Counter() for keep in keeps}
    ours: dict[str, Counter[str]] = {keep: Counter() for keep in keeps}
    for seed in range(6):
        model = planned(tiny_model(variant, torch.float32 if dtype == "autocast" else dtype, seed))
        inputs = batch("packed", seed)
        with exact_float64():
            truth = gradients(copy.deepcopy(model).double(), inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            own = relative_errors(gradients(model, inputs), truth)
            for keep in keeps:
                theirs[keep].update(own)
                ours[keep].update(relative_errors(gradients(cogsym.prepare(model, PLAN, keep=keep), inputs), truth))
    worse = {
        (keep, n): (ours[keep][n], theirs[keep][n])
        for keep in keeps
        for n in ours[keep].keys() - {"loss"}  # one number of each run, which six may well hit by chance
        if ours[keep][n] > 2 * theirs[keep][n]
    }
    assert not worse


@pytest.mark.parametrize(("variant", "dtype"), LOW_PRECISION[: 3 * len(VARIANTS)], ids=str)
def test_error_of_the_loss_is_at_most_twice_that_of_transformers(variant: str, dtype: Any) -> None:
    """Over as many losses as it takes for the mean error of either side to be no chance."""
    theirs = ours = 0.0
    for seed in range(3):
        model = planned(tiny_model(variant, torch.float32 if dtype == "autocast" else dtype, seed)).train()
        exact = copy.deepcopy(model).double()
        batches = [batch("packed", 100 * seed + i) for i in range(12)]

        def losses(of: Any, batches: list[dict[str, Tensor]] = batches) -> Tensor:
            return torch.tensor([of(**inputs, use_cache=False).loss.item() for inputs in batches]).double()

        with exact_float64():
            truth = losses(exact)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            theirs += (losses(model) - truth).abs().sum().item()
            ours += (losses(cogsym.prepare(model, PLAN)) - truth).abs().sum().item()
    last_rounding = 36 * torch.finfo(torch.float32).eps * truth.max().item() / 2  # granted: transformers' may be none
    assert ours <= 2 * theirs + last_rounding


@pytest.fixture(scope="module")
def llama_8b() -> Any:
    """Llama-3.1-8B's decoder layer, its weights anything."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaModel(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.01)
        p.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("keep", "expected"), [(None, 139_400), ("all", 94_336), ("attention", 24_704), ("input", 8_192)]
)
def test_bytes_of_a_frozen_llama_8b_layer(llama_8b: Any, keep: Keep | None, expected: int) -> None:
    """A token's: exactly, and what transformers itself holds."""
    layer, T = llama_8b.layers[0], 8
    x = torch.randn(1, T, 4096).bfloat16().requires_grad_()
    tables = [torch.randn(1, T, 128).bfloat16() for _ in range(2)]
    positions = tuple(tables)
    if keep is None:
        left_out = [*tables, *layer.parameters()]
        assert saved_bytes(lambda: layer(x, position_embeddings=positions), left_out) == expected * T
        return
    block = read_block(layer)
    inputs = LayerInputs({"position_embeddings": positions})
    inputs.positions = block.positions(inputs, x, training=True)
    assert saved_bytes(lambda: run_frozen(block, x, inputs, keep)) == expected * T
    assert cost(block, keep, T, 2).bytes_per_token == expected


def layer_calls(model: Any, ids: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """What each layer is called with: the hidden states, and the keywords."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
        for layer in model.model.layers
    ]
    model.eval()(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize(
    "variant",
    [
        "llama", "gemma2", "gemma3", "olmo2", "phi3", "smollm3", "granite", "qwen2-windows", "cohere", "cohere2",
        "stablelm-parallel", "starcoder2", "apertus", "ministral3",
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", KEEPS)
def test_bytes_and_flops_are_those_promised(variant: str, keep: Keep) -> None:
    """Of a whole run of six frozen layers, and `explain` says the same."""
    changes: dict[str, Any] = {"num_hidden_layers": 8}
    if variant == "smollm3":
        changes["no_rope_layers"] = [1, 0] * 4
    if "layer_types" in EVERY[variant][1]:
        changes["layer_types"] = ["full_attention", "sliding_attention"] * 4
    model, B, T = tiny_model(variant, torch.bfloat16, **changes), 2, 16
    ids = torch.randint(0, 61, (B, T))
    plan = cogsym.LayerPlan.layers(8, [], embeddings=True, head=model.config.tie_word_embeddings)
    cogsym.prepare(model, plan, keep=keep)
    layers, calls = model.model.layers, layer_calls(model, ids)
    x = calls[0][0].detach().requires_grad_()

    def run() -> Tensor:
        y = x
        for layer, (_, kwargs) in zip(layers, calls, strict=True):
            y = layer(y, **kwargs)
        return y

    reports = cogsym.explain(model).layers
    shared = [t for _, kwargs in calls for t in (*kwargs["position_embeddings"], kwargs["attention_mask"])]
    held = saved_bytes(run, filter(torch.is_tensor, shared))
    promised = [r.bytes_per_token for r in reports]
    blocks = [read_block(layer) for layer in layers]
    assert held == B * T * sum(promised)
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    expected = sum(cost(block, keep, T, 2).flops for block in blocks)
    if keep == "nothing":
        expected += run_flops(blocks, T)
    assert counter.get_total_flops() == B * expected


def test_auto_fits_its_budget_and_repeats_little() -> None:
    blocks = dict(enumerate(read_block(layer) for layer in tiny_model("llama", num_hidden_layers=6).model.layers))
    T, B = 16, 2
    of = {keep: cost(blocks[0], keep, T, 4).bytes_per_token * B * T for keep in KEEPS}

    def chosen(budget: int) -> list[Keep]:
        return list(choose(blocks, B * T, T, 4, budget).values())

    assert chosen(6 * of["all"]) == ["all"] * 6
    assert chosen(6 * of["all"] - 1) == ["attention"] + ["all"] * 5
    assert chosen(6 * of["input"]) == ["input"] * 6
    assert chosen(6 * of["input"] - 1) == ["nothing"] * 2 + ["input"] * 4
    for budget in range(6 * of["input"], 6 * of["all"], 97):
        assert sum(of[keep] for keep in chosen(budget)) <= budget


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gemma3", "olmo2", "granite", "cohere"])
@pytest.mark.parametrize("keep", KEEPS)
def test_gradcheck_on_the_reference_path(variant: str, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of three frozen layers, one document packed behind another, against finite differences."""
    monkeypatch.setenv("COGSYM_BACKEND", "reference")
    shape = {
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    model = tiny_model(variant, torch.float64, **shape)
    blocks = [read_block(layer.requires_grad_(False)) for layer in model.model.layers[:3]]
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 4, 2, dtype=torch.float64)
    where = Positions(angles.cos(), angles.sin(), torch.tensor([[0, 0, 2, 2]], dtype=torch.int32), None)
    inputs = LayerInputs(positions=where)

    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = run_frozen(block, x, inputs, keep)
        return x

    torch.autograd.gradcheck(run, x)
