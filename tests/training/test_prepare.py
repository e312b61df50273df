from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from served import ATTENTION, MLP, PATH, SLOWER, SLOWER_ATTENTION, SLOWER_MLP
from tiny_models import batch, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import cogsym
from cogsym import CogsymError, LayerPlan, ops


def loss_of(model: Any) -> torch.Tensor:
    return model(**batch("packed"), use_cache=False).loss


def fast_path_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks of a forward pass take the fast path."""
    from cogsym.models import Block

    calls = []
    for name in ("forward", "run"):
        original = getattr(Block, name)
        monkeypatch.setattr(Block, name, lambda *a, original=original, **k: calls.append(1) or original(*a, **k))
    loss_of(model)
    return len(calls)


def test_the_middle_is_frozen_and_the_outer_layers_trained() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    needed = {n for n, p in model.named_parameters() if p.requires_grad}
    assert needed == {n for n, _ in model.named_parameters() if n.startswith(("model.layers.0.", "model.layers.3."))}


def test_restore_puts_everything_back() -> None:
    model = tiny_model("qwen3")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attributes = [dict(vars(m)) for m in model.modules()]
    keys = list(model.state_dict())
    cogsym.prepare(model, LayerPlan.outer(4))
    assert list(model.state_dict()) == keys
    cogsym.restore(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [dict(vars(m)) for m in model.modules()] == attributes
    with pytest.raises(CogsymError, match="not prepared; call cogsym"):
        cogsym.restore(model)


def test_a_second_prepare_replaces_the_first() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    cogsym.prepare(model, LayerPlan.last(4, 1))
    assert {n[:15] for n, p in model.named_parameters() if p.requires_grad} == {"model.layers.3."}
    cogsym.restore(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_bad_second_plan_leaves_the_first() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    with pytest.raises(CogsymError, match="plan is for 5 layers"):
        cogsym.prepare(model, LayerPlan.outer(5))
    assert cogsym.explain(model).layers[0].trained == "trained"


def test_explain_says_what_runs_where() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    report = cogsym.explain(model)
    assert [layer.trained for layer in report.layers] == ["trained", "frozen", "frozen", "trained"]
    assert report.layers[2].mlp == "own forward" and report.layers[2].attention == ATTENTION
    reasons = "; ".join([*SLOWER_ATTENTION, "a hook on LlamaMLP must fire; checkpointed"])
    assert report.layers[2].reason == reasons
    assert f"layer 2: frozen, attention {ATTENTION}, MLP own forward ({reasons})" in str(report)
    also = model.model.layers[2].self_attn.register_forward_hook(lambda *_: None)
    report = cogsym.explain(model)
    assert report.layers[2].path == "own forward"
    reasons = "a hook on LlamaAttention must fire and a hook on LlamaMLP must fire; checkpointed"
    assert f"layer 2: frozen, own forward ({reasons})" in str(report)
    handle.remove()
    also.remove()
    assert cogsym.explain(model).layers[2].path == PATH


def test_a_hook_on_a_module_that_the_fast_path_leaves_out_still_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    seen = []
    layer = model.model.layers[1]
    for module in (layer.self_attn, layer.mlp.act_fn, layer.post_attention_layernorm, layer.mlp.down_proj):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    assert fast_path_runs(model, monkeypatch) == 3  # neither half of it is ours
    assert sorted(seen) == ["Linear", "LlamaAttention", "LlamaRMSNorm", "SiLUActivation"]


def test_hidden_states_and_attentions_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model("llama", attn_implementation="eager")
    model = cogsym.prepare(copy.deepcopy(plain), LayerPlan.outer(4))
    ids = batch("plain")["input_ids"]
    wants = {"output_hidden_states": True, "output_attentions": True}
    got, want = model(ids, **wants), plain(ids, **wants)
    assert len(got.attentions) == 4 and len(got.hidden_states) == 5
    torch.testing.assert_close(got.attentions, want.attentions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-4, atol=1e-4)
    # transformers leaves its hooks behind; they do not slow later calls down.
    assert fast_path_runs(model, monkeypatch) == 4


def test_a_copy_has_blocks_of_its_own() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        twin_logits = twin(batch("plain")["input_ids"]).logits
        logits = model(batch("plain")["input_ids"]).logits
    assert not twin_logits.any() and logits.any()
    cogsym.restore(twin)
    assert cogsym.explain(model)


def test_pickle_round_trip() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(loss_of(twin), loss_of(model))


def test_save_pretrained_writes_what_plain_transformers_loads(tmp_path: Path) -> None:
    model = cogsym.prepare(tiny_model("qwen2"), LayerPlan.outer(4))
    model.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loss_of(plain.eval()), loss_of(model))


def test_compiles_whole_without_a_graph_break() -> None:
    model = cogsym.prepare(tiny_model("llama", num_hidden_layers=2), LayerPlan.outer(2, front=0, back=1))
    inputs = batch("plain")
    eager = model(**inputs, use_cache=False)
    eager.loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)(**inputs, use_cache=False)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=1e-4, atol=1e-4)
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-3, atol=1e-5)


def test_lora_modules_are_used_and_only_planned_adapters_train() -> None:
    plain = get_peft_model(
        tiny_model("llama"), LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    )
    for n, p in plain.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)  # peft starts it at zero, which hides a forgotten adapter
    model = copy.deepcopy(plain)
    cogsym.prepare(model, LayerPlan.outer(4))
    needed = {n for n, p in model.named_parameters() if p.requires_grad}
    assert needed == {
        n for n, _ in model.named_parameters() if "lora_" in n and (".layers.0." in n or ".layers.3." in n)
    }
    got, want = loss_of(model), loss_of(plain)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    theirs = {n: p.grad for n, p in plain.named_parameters()}
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs[n], rtol=1e-4, atol=1e-7)
    assert cogsym.explain(model).layers[0].trained == "adapters trained"


def test_adapters_outside_the_plan_are_told() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]))
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        CogsymError, match="leaves no parameter to train; with peft, give the adapter the plan's layers"
    ):
        cogsym.prepare(model, LayerPlan.outer(4, front=1, back=1))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_not_a_decoder() -> None:
    with pytest.raises(CogsymError, match="Linear has no decoder layers"):
        cogsym.prepare(torch.nn.Linear(2, 2), LayerPlan.outer(4))


def test_gradient_checkpointing_and_accumulation_give_the_same_gradients() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    loss_of(model).backward()
    want = {n: 2 * p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(model).backward()
    loss_of(model).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for n in got:
        torch.testing.assert_close(got[n], want[n], rtol=1e-4, atol=1e-6)


def test_inside_a_plain_trainer_only_the_outer_layers_move(tmp_path: Path) -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs = batch("packed")
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(3)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    first = loss_of(model).item()
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert loss_of(model).item() < first
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_dropout": 0.1}, "attention dropout is on"),
        ({"attn_implementation": "flex_attention"}, "the model was loaded with flex_attention attention"),
    ],
)
def test_attention_that_must_be_the_model_s_own_is_told(changes: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama", **changes)
    layers = cogsym.explain(cogsym.prepare(model, LayerPlan.outer(4), keep="input")).layers
    reasons = [f"but the model's own attention: {reason}", *SLOWER]
    assert (layers[0].path, layers[0].reason) == (PATH, "; ".join(reasons))
    whole = reason == "attention dropout is on"  # to draw the same again, the whole layer is checkpointed
    assert (layers[1].attention, layers[1].mlp) == ("own forward", "own forward" if whole else MLP)
    checkpointed = f"{reason}; checkpointed" if whole else "; ".join([*SLOWER_MLP, f"{reason}; checkpointed"])
    assert layers[1].reason == checkpointed
    layers = cogsym.explain(cogsym.prepare(model, LayerPlan.outer(4), keep="all")).layers
    assert layers[1].reason == (reason if whole else checkpointed)


def test_explain_names_what_computes_and_why_nothing_faster_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    report = cogsym.explain(model)
    assert report.layers[1].path == PATH and report.layers[1].reason == "; ".join(SLOWER)
    loss, why = ops.route("linear_cross_entropy", torch.device("cpu"), torch.float32)
    assert report.head == f"loss without logits, {loss}{f' ({why})' if why else ''}"
    monkeypatch.setenv("COGSYM_BACKEND", "reference")
    report = cogsym.explain(model)
    assert report.layers[1].path == "reference"
    assert "attention on reference: COGSYM_BACKEND is reference" in report.layers[1].reason
    assert report.head == "loss without logits, reference (COGSYM_BACKEND is reference)"


@pytest.mark.parametrize(
    ("dtype", "cap", "backend_of_attention", "reason"),
    [
        (torch.bfloat16, None, "flash", ""),
        (torch.float32, None, "triton", "flash"),
        (torch.bfloat16, 30.0, "triton", "flash"),
    ],
)
def test_explain_on_a_gpu_does_not_claim_a_kernel_that_is_not_taken(
    dtype: torch.dtype, cap: float | None, backend_of_attention: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed to be told where tensors on one would go."""
    variant = "gemma2" if cap else "llama"
    changes = {"attn_logit_softcapping": cap} if cap else {}
    model = tiny_model(variant, dtype, head_dim=16, **changes)
    cogsym.prepare(model, LayerPlan.outer(4))
    route = ops.route
    monkeypatch.setattr(
        ops, "route", lambda name, device, *args, **facts: route(name, torch.device("cuda"), *args, **facts)
    )
    report = cogsym.explain(model).layers[0]
    assert report.attention == backend_of_attention
    assert reason in report.reason and bool(reason) == ("attention on triton" in report.reason)


def test_explain_says_how_the_head_runs() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert cogsym.explain(model).head == "logits by its own forward (a hook on its head must fire)"
    assert str(cogsym.explain(model)).splitlines()[-1] == f"head: {cogsym.explain(model).head}"
    handle.remove()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert cogsym.explain(model).head == "logits by its own forward (another library has replaced the model's forward)"


def test_logits_that_were_never_made_are_missed_in_a_sentence() -> None:
    model, inputs = tiny_model("llama").train(), batch("plain")
    want = model(**inputs)
    outputs = cogsym.prepare(model, LayerPlan.outer(4))(**inputs)
    assert outputs[0] is outputs["loss"] is outputs.loss and not hasattr(outputs, "logits")
    assert outputs.attentions is None and pickle.loads(pickle.dumps(outputs)).loss == outputs.loss
    with pytest.raises(CogsymError, match=r"code read the logits; prepare the model with logits=True, and each step"):
        _ = outputs.logits.shape
    with pytest.raises(AttributeError, match="CausalLMLoss has no attribute 'logit'"):
        _ = outputs.logit
    assert model.eval()(**inputs).logits.shape == want.logits.shape

    outputs = cogsym.prepare(model.train(), LayerPlan.outer(4), logits=True)(**inputs)
    torch.testing.assert_close([outputs.loss, outputs.logits], [want.loss, want.logits], rtol=1e-5, atol=1e-5)
    assert cogsym.explain(model).head == "logits by its own forward (prepare was asked for them)"
    assert cogsym.restore(model)(**inputs).logits.shape == want.logits.shape


def test_what_peft_trains_outside_of_layers_stays_trained() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = cogsym.prepare(get_peft_model(tiny_model("llama"), config), LayerPlan.outer(4, front=1, back=1))
    needed = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save" in n for n in needed)
    assert {n.split(".layers.")[1][0] for n in needed if ".layers." in n} == {"0", "3"}


def test_trainable_tokens_stay_trained() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]})
    model = cogsym.prepare(get_peft_model(tiny_model("llama"), config), LayerPlan.outer(4, front=1, back=1))
    assert any("trainable_tokens_delta" in n for n, p in model.named_parameters() if p.requires_grad)


def test_adapters_that_are_switched_between_two_calls() -> None:
    """The second call trains those that are active then, and `restore` leaves them so."""

    def needed() -> set[tuple[str, str]]:
        trained = [n.split(".") for n, p in model.named_parameters() if p.requires_grad]
        return {(n[n.index("layers") + 1], n[-2]) for n in trained}

    model, plan = get_peft_model(tiny_model("llama"), LoraConfig(r=2)), LayerPlan.outer(4, front=1, back=1)
    model.add_adapter("other", LoraConfig(r=2))
    cogsym.prepare(model, plan)
    assert needed() == {("0", "default"), ("3", "default")}
    model.set_adapter("other")
    cogsym.prepare(model, plan)
    assert needed() == {("0", "other"), ("3", "other")}
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    cogsym.restore(model)
    assert needed() == {(str(i), "other") for i in range(4)}


@pytest.mark.parametrize("tuner", [LNTuningConfig(target_modules=["input_layernorm"]), IA3Config(
    target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
)], ids=["ln-tuning", "ia3"])  # fmt: skip
def test_other_tuners_of_peft_give_their_gradients(tuner: Any) -> None:
    plain = get_peft_model(tiny_model("llama"), tuner)
    model = cogsym.prepare(copy.deepcopy(plain), LayerPlan.all(4))
    got, want = loss_of(model), loss_of(plain)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for n in theirs:
        torch.testing.assert_close(ours[n], theirs[n], rtol=1e-4, atol=1e-7)


def test_quantised_weights_cannot_be_trained() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(52, 36, dtype=torch.uint8), requires_grad=False
    )
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        CogsymError, match="plan trains layer 0, which holds weights quantised to uint8, expected float"
    ):
        cogsym.prepare(model, LayerPlan.outer(4))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_tuple_is_returned_where_one_is_asked_for() -> None:
    model = tiny_model("llama").train()
    inputs = batch("plain")
    want = model(**inputs, return_dict=False, use_cache=False)
    got = cogsym.prepare(model, LayerPlan.outer(4))(**inputs, return_dict=False, use_cache=False)
    assert type(got) is tuple and len(got) == len(want)
    torch.testing.assert_close(got[0], want[0])


def test_a_wrapper_put_around_a_module_before_runs_by_itself() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    for name in ("mlp", "self_attn"):
        model = tiny_model("llama")
        want = loss_of(model)
        setattr(model.model.layers[1], name, Wrapper(getattr(model.model.layers[1], name)))
        cogsym.prepare(model, LayerPlan.outer(4))
        torch.testing.assert_close(loss_of(model), want)
        assert "own forward" in cogsym.explain(model).layers[1].path


def test_documents_packed_by_positions_attend_as_in_transformers() -> None:
    """In a bare loop transformers makes a cache, and then sees no packing; prepared, in training too."""
    model, inputs = tiny_model("llama"), batch("packed")
    want = {training: model.train(training)(**inputs).loss for training in (False, True)}
    apart = model(**inputs, use_cache=False).loss
    assert abs(apart - want[True]) > 1e-3
    cogsym.prepare(model, LayerPlan.outer(4))
    with pytest.warns(UserWarning, match=r"fills a cache.*pass use_cache=False"):
        got = model.train()(**inputs).loss
    torch.testing.assert_close(got, want[True])
    torch.testing.assert_close(model.eval()(**inputs).loss, want[False])
    torch.testing.assert_close(model.train()(**inputs, use_cache=False).loss, apart)


def test_explain_counts_what_needs_a_gradient_now() -> None:
    model = cogsym.prepare(tiny_model("llama"), LayerPlan.outer(4))
    assert "changed since" not in str(cogsym.explain(model))
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    needed = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"changed since: {needed:,} of " in str(cogsym.explain(model))
    assert cogsym.explain(model).layers[1].trained == "partly trained"
