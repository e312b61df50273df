"""Trained blocks: what they keep, adapters in them, and any choice of what in them is trained."""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, exact_float64, tiny_model
from torch import Tensor, nn

import cogsym
import cogsym.training.prepare
from cogsym.bench.method import saved_bytes
from cogsym.models import read_block

prepare_module = sys.modules["cogsym.training.prepare"]  # the package has a function of this name
KEEPS = ("all", "attention", "input", "nothing")
LAYERS = 4
PLAN = cogsym.LayerPlan.layers(LAYERS, [0, 2])
RANK = 3


def gradients(model: nn.Module, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The loss and every gradient of one training step."""
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout
    loss = model.train()(**inputs, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    errors = {n: ((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want}
    assert max(errors.values()) < 1e-11, errors


def adapted(variant: str, layers: list[int] | None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny model with adapters on every projection of `layers`, None for all, and all of their weights random."""
    base = tiny_model(variant, dtype, num_hidden_layers=LAYERS)
    names = sorted({n.rpartition(".")[2] for n, m in base.model.layers.named_modules() if isinstance(m, nn.Linear)})
    pattern = None if layers is None else "layers"
    config = LoraConfig(r=RANK, target_modules=names, layers_to_transform=layers, layers_pattern=pattern, **options)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)  # peft starts it at zero, which hides a forgotten adapter
        elif "magnitude" in n:
            p.data.mul_(1 + 0.2 * torch.rand_like(p))
    return model


@pytest.mark.filterwarnings("ignore:.*lora_bias")  # such adapters cannot be merged, which nobody does here
@pytest.mark.parametrize("layers", [[0, 2], None], ids=["on trained layers", "on all layers"])
@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.3},
        {"use_rslora": True, "lora_bias": True},
    ],
    ids=["dropout", "dora", "dora-dropout", "rslora-bias"],
)
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3", "phi3"])
def test_adapters_get_the_gradients_of_plain_peft(variant: str, options: Any, layers: list[int] | None) -> None:
    """With the same seed: adapters draw their dropout in the same order. Layers between are frozen."""
    model, inputs = adapted(variant, layers, **options), batch("packed")
    plain = copy.deepcopy(model)
    for n, p in plain.named_parameters():
        p.requires_grad_("lora_" in n and any(f".layers.{i}." in n for i in (0, 2)))
    with exact_float64():
        want = gradients(plain, inputs)
        for keep in KEEPS:
            cogsym.prepare(model, PLAN, keep=keep)
            assert_equal(gradients(model, inputs), want)
        if layers is not None:
            assert cogsym.explain(model).layers[1].keep == "nothing"
    if "lora_dropout" in options:
        assert gradients(plain, inputs, seed=1)["loss"] != want["loss"]


def bytes_of_one_layer(model: Any, layer: Any) -> int:
    """Saved for a token of one layer, its parameters and what all layers share left out."""
    B, T = 2, 16
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    hook = layer.register_forward_pre_hook(lambda _, a, k: calls.append((a[0], k)), with_kwargs=True)
    model.train()(torch.randint(0, 61, (B, T)), use_cache=False)
    hook.remove()
    ((x, kwargs),) = calls
    x = x.detach().requires_grad_()
    shared = [*layer.parameters(), *kwargs["position_embeddings"], kwargs["attention_mask"]]
    shared += read_block(layer).attention.rotary.tables(kwargs["position_embeddings"])
    return saved_bytes(lambda: layer(x, **kwargs), filter(torch.is_tensor, shared)) // (B * T)


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "mistral", "qwen2", "smollm3"])
def test_a_trained_block_keeps_exactly_what_its_gradients_need(variant: str) -> None:
    """In bfloat16: x, n, q, k, v, o, lse, h, m, g, u and z; and transformers keeps more."""
    model = tiny_model(variant, torch.bfloat16)
    theirs = bytes_of_one_layer(model, model.model.layers[0])
    cogsym.prepare(model, cogsym.LayerPlan.all(LAYERS))
    config = model.config
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    expected = 2 * (4 * D + (2 * H + 2 * G) * d + 3 * F) + 4 * H
    assert bytes_of_one_layer(model, model.model.layers[0]) == expected <= theirs


@pytest.mark.parametrize(
    ("variant", "streams", "hidden", "normed"),
    [("cohere", 2, 3, 0), ("stablelm-parallel", 2, 3, 0), ("starcoder2", 4, 2, 0), ("apertus", 4, 2, 1)],
)
def test_what_other_topologies_keep(variant: str, streams: int, hidden: int, normed: int) -> None:
    """Side by side: x and n for both halves; without a gate: u and z; with norms of queries and keys: these, raw."""
    model = tiny_model(variant, torch.bfloat16, sliding_window=None)
    theirs = bytes_of_one_layer(model, model.model.layers[0])
    cogsym.prepare(model, cogsym.LayerPlan.all(LAYERS))
    config, module = model.config, model.model.layers[0].self_attn
    D, F, d = config.hidden_size, config.intermediate_size, module.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    heads = (2 * H + 2 * G + normed * (H + G)) * d
    expected = 2 * (streams * D + heads + hidden * F) + 4 * H
    assert bytes_of_one_layer(model, model.model.layers[0]) == expected <= theirs


def test_a_lora_block_keeps_the_inputs_of_its_adapters_and_their_inner_vectors() -> None:
    """What a trained block keeps, for the gradients of A; and A's seven outputs, for those of B."""
    model = adapted("llama", None, torch.bfloat16)
    layer = model.get_decoder().layers[0]
    theirs = bytes_of_one_layer(model, layer)
    cogsym.prepare(model, cogsym.LayerPlan.layers(LAYERS, [0]))
    config = model.config
    D, F, d = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    expected = 2 * (4 * D + (2 * H + 2 * G) * d + 3 * F + 7 * RANK) + 4 * H
    assert bytes_of_one_layer(model, layer) == expected <= theirs


PARTS = ("weights", "biases", "norms", "embeddings", "head")


def part(name: str) -> str:
    """Which of PARTS a parameter belongs to."""
    if "embed_tokens" in name or "lm_head" in name:
        return "embeddings" if "embed_tokens" in name else "head"
    return "norms" if "norm" in name else "biases" if name.endswith("bias") else "weights"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3-windows-biases", "gemma2"])
def test_any_part_trained_or_frozen_gets_its_gradient_or_none(variant: str, tied: bool) -> None:
    """Every combination of PARTS in two of four layers, the other two frozen; a tied head goes with the embeddings."""
    model, inputs = (
        tiny_model(variant, torch.float64, tie_word_embeddings=tied, num_hidden_layers=LAYERS),
        batch("packed"),
    )
    keeps = itertools.cycle(KEEPS)
    with exact_float64():
        everything = gradients(model, inputs)
        for flags in itertools.product((False, True), repeat=len(PARTS)):
            on = dict(zip(PARTS, flags, strict=True))
            if not any(flags) or (tied and on["embeddings"] != on["head"]):
                continue
            cogsym.prepare(model, PLAN, keep=next(keeps))
            for name, p in model.named_parameters():
                frozen_layer = ".layers.1." in name or ".layers.3." in name
                p.requires_grad_(on[part(name)] and not frozen_layer)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            if not trained:
                continue
            assert_equal(gradients(model, inputs), {n: everything[n] for n in ("loss", *trained)})


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed")
@pytest.mark.skipif(not prepare_module._CHECKPOINTS_FORWARD, reason="this transformers checkpoints frozen layers too")
@pytest.mark.parametrize("keep", KEEPS)
def test_gradient_checkpointing_is_for_trained_layers_frozen_ones_keep_what_was_chosen(keep: str) -> None:
    model, inputs = tiny_model("llama", torch.float64, num_hidden_layers=LAYERS), batch("packed")
    cogsym.prepare(model, PLAN, keep=keep)
    want = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert_equal(gradients(model, inputs), want)
    model = cogsym.prepare(tiny_model("llama", torch.bfloat16, num_hidden_layers=LAYERS), PLAN, keep=keep)
    before = [bytes_of_one_layer(model, layer) for layer in model.model.layers]
    model.gradient_checkpointing_enable()
    after = [bytes_of_one_layer(model, layer) for layer in model.model.layers]
    stream, reports = 2 * model.config.hidden_size, cogsym.explain(model).layers
    assert after == [stream if i in PLAN.trained else reports[i].bytes_per_token for i in range(LAYERS)]
    assert [before[i] > 5 * stream for i in PLAN.trained] == [True, True]
