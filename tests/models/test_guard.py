"""What is not as transformers made it runs its own forward, whenever it changed, and the gradients are still right."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from served import PATH, SLOWER
from tiny_models import batch, exact_float64, tiny_model
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import cogsym
from cogsym.models import Block
from cogsym.models.guard import Watch

PLAN = cogsym.LayerPlan.outer(4, front=1, back=1)


def doubled(forward: Any) -> Any:
    """A forward that gives twice what it gave."""

    @functools.wraps(forward)
    def changed(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y

    return changed


class TwiceMLP(modeling_llama.LlamaMLP):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def set_instance_forward(path: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def disturb(layer: Any, patch: pytest.MonkeyPatch) -> None:
        module = layer.get_submodule(path)
        module.forward = doubled(module.forward)

    return disturb


def patch_class(name: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def disturb(layer: Any, patch: pytest.MonkeyPatch) -> None:
        cls = getattr(modeling_llama, name)
        patch.setattr(cls, "forward", doubled(cls.forward))

    return disturb


def subclass(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.__class__ = TwiceMLP


def swap(layer: Any, patch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(layer.mlp)
    other.act_fn = nn.Tanh()
    layer.mlp = other


def swap_norm(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.input_layernorm = nn.LayerNorm(36, dtype=torch.float64).requires_grad_(False)


def hook(path: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def disturb(layer: Any, patch: pytest.MonkeyPatch) -> None:
        module = layer.get_submodule(path)
        module.register_forward_hook(lambda _module, _args, y: (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y)

    return disturb


def scale_gradient(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.register_full_backward_hook(lambda _module, dx, _dy: tuple(3 * d for d in dx))


def parametrize(layer: Any, patch: pytest.MonkeyPatch) -> None:
    nn.utils.parametrizations.weight_norm(layer.mlp.up_proj.double())
    layer.mlp.up_proj.requires_grad_(False)


DISTURBANCES: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    **{f"forward of {path}": set_instance_forward(path) for path in (
        "self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm", "self_attn.k_proj",
        "mlp.down_proj",
    )},
    **{f"class {name}": patch_class(name) for name in ("LlamaMLP", "LlamaAttention", "LlamaRMSNorm")},
    "class LlamaDecoderLayer": patch_class("LlamaDecoderLayer"),
    "subclass": subclass,
    "swapped MLP": swap,
    "swapped norm": swap_norm,
    **{f"hook on {path or 'layer'}": hook(path) for path in (
        "", "self_attn", "mlp", "mlp.act_fn", "post_attention_layernorm", "self_attn.q_proj",
    )},
    "backward hook": scale_gradient,
    "parametrisation": parametrize,
}  # fmt: skip


def results(model: Any) -> dict[str, Tensor]:
    """The loss and every gradient of a training step."""
    model.zero_grad()
    model.train()
    loss = model(**batch("padded-left"), use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def freeze(model: Any) -> Any:
    for part in PLAN.parts(model):
        for p in part.parameters:
            p.requires_grad_(part.trained)
    return model


@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("name", DISTURBANCES)
def test_gradients_are_those_of_the_disturbed_model(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disturbed before prepare, after it, or between two steps: one frozen layer, or every one where it is a class."""
    model = tiny_model("llama", torch.float64)
    plain = freeze(copy.deepcopy(model))
    if when == "before":
        DISTURBANCES[name](model.model.layers[1], monkeypatch)
    cogsym.prepare(model, PLAN, keep="input")
    if when == "between":
        results(model)
    if when != "before":
        DISTURBANCES[name](model.model.layers[1], monkeypatch)
    if not name.startswith("class"):
        DISTURBANCES[name](plain.model.layers[1], monkeypatch)
    with exact_float64():
        got, want = results(model), results(plain)
    assert got.keys() == want.keys()
    errors = {n: ((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want}
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("name", DISTURBANCES)
def test_explain_says_what_stands_in_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cogsym.prepare(tiny_model("llama", torch.float64), PLAN)
    assert cogsym.explain(model).layers[1].reason == "; ".join(SLOWER)
    DISTURBANCES[name](model.model.layers[1], monkeypatch)
    reason = cogsym.explain(model).layers[1].reason
    if name == "hook on layer":  # the layer itself is called as ever
        assert reason == "; ".join(SLOWER)
    elif name in (
        "hook on self_attn.q_proj", "forward of self_attn.k_proj", "forward of mlp.down_proj", "parametrisation",
    ):  # fmt: skip
        assert reason == "; ".join([*SLOWER, "its projections are called as modules: it keeps what autograd keeps"])
    else:
        why = ("another library", "is not the one", "stands where", "must fire", "has no kernel")
        assert any(words in reason for words in why)


def test_nothing_is_read_again_until_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogsym.training import layer as prepared

    reads: list[Any] = []
    original = prepared.read_block
    monkeypatch.setattr(prepared, "read_block", lambda layer, **how: reads.append(layer) or original(layer, **how))
    model = cogsym.prepare(tiny_model("llama"), PLAN)
    reads.clear()
    for _ in range(3):
        results(model)
    assert not reads
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    results(model)
    assert reads == [model.model.layers[2]]
    handle.remove()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    results(model)
    assert set(map(id, reads[1:])) == {id(model.model.layers[1]), id(model.model.layers[2])}


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
        lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.mlp.register_full_backward_hook(lambda *_: None),
        lambda layer: setattr(layer, "mlp", copy.deepcopy(layer.mlp)),
        lambda layer: setattr(layer.mlp.up_proj, "weight", nn.Parameter(layer.mlp.up_proj.weight.clone())),
        lambda layer: layer.mlp.up_proj.weight.requires_grad_(False),
        lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
        lambda layer: setattr(layer.mlp.__class__, "forward", doubled(layer.mlp.__class__.forward)),
        lambda layer: setattr(layer.mlp, "__class__", TwiceMLP),
        lambda layer: layer.mlp.up_proj.to("meta"),
    ],
)
def test_watch_sees_every_change_that_decides(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", modeling_llama.LlamaMLP.forward)  # put back afterwards
    layer = tiny_model("llama").model.layers[0]
    watch = Watch(layer)
    assert not watch.changed()
    change(layer)
    assert watch.changed()


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_weights_are_there_when_they_are_used(when: str) -> None:
    model = tiny_model("llama", torch.float64)
    inputs = batch("plain")
    with exact_float64(), torch.no_grad():
        want = model.train()(**inputs, use_cache=False).loss
        if when == "before":
            cpu_offload(model, torch.device("cpu"))
        cogsym.prepare(model, PLAN)
        if when == "after":
            cpu_offload(model, torch.device("cpu"))
        for _ in range(2):
            assert abs(model(**inputs, use_cache=False).loss - want) < 1e-12
    assert "not in memory" in str(cogsym.explain(model)) or "another library" in str(cogsym.explain(model))


class Seen(ModelHook):
    """Counts the calls of the module that it is on."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        return args, kwargs


def test_restore_and_a_second_prepare_leave_what_another_library_put_on() -> None:
    model = cogsym.prepare(tiny_model("llama"), PLAN)
    layer = model.model.layers[1]
    add_hook_to_module(layer, Seen())
    want = results(model)["loss"]
    assert Seen.calls == 1
    assert cogsym.explain(model).layers[1].path == PATH
    cogsym.prepare(model, PLAN)
    assert results(model)["loss"] == want and Seen.calls == 2
    assert cogsym.explain(model).layers[1].path == PATH
    cogsym.restore(model)
    torch.testing.assert_close(results(model)["loss"], want)
    assert Seen.calls == 3
    remove_hook_from_module(layer)
    results(model)
    assert Seen.calls == 3


def test_a_forward_put_around_the_model_survives() -> None:
    model = cogsym.prepare(tiny_model("llama"), PLAN)
    calls: list[int] = []
    inner = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    results(model)
    cogsym.restore(model)
    results(model)
    assert len(calls) == 2 and "forward" in vars(model)


def test_copies_and_pickles_do_not_share_what_was_read() -> None:
    model = cogsym.prepare(tiny_model("llama"), PLAN)
    results(model)
    twin = copy.deepcopy(model)
    twin.model.layers[1].mlp.act_fn = nn.Tanh()
    results(twin)
    assert "the activation Tanh has no kernel" in cogsym.explain(twin).layers[1].reason
    assert cogsym.explain(model).layers[1].reason == "; ".join(SLOWER)


def test_both_halves_known_means_no_module_of_theirs_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of the guard: where nothing stands in the way, the fast path is taken."""
    model = cogsym.prepare(tiny_model("llama"), PLAN)
    taken: list[Block] = []
    run = Block.run
    monkeypatch.setattr(Block, "run", lambda self, *args: taken.append(self) or run(self, *args))
    results(model)
    assert len(taken) == 2
