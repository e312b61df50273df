"""Frozen layers on disk against the same layers in memory: bit for bit, in little memory, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from training.killed import killed_in_step
from transformers import AutoModelForCausalLM, DynamicCache

import cogsym
from cogsym import CogsymError, LayerPlan, TrainSettings
from cogsym.data import Source
from cogsym.models import precision
from cogsym.training import streamed
from cogsym.training.finetune import dry_run

LAYERS = 7


def folder_of(model_folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The tiny model's tokenizer with another model, in several files."""
    (model_folder / "model.safetensors").unlink()
    model = tiny_model(variant, dtype, vocab_size=300, num_hidden_layers=LAYERS, initializer_range=0.2, **changes)
    model.save_pretrained(model_folder, max_shard_size="40KB")
    assert len([*model_folder.glob("*.safetensors")]) > 2
    return model_folder


def run(
    folder: Path,
    text: Path,
    out: Path,
    stream: bool,
    plan: LayerPlan | None = None,
    resume: bool = False,
    **changes: Any,
) -> cogsym.TrainResult:
    source = Source(text, field="sw")
    asked = {"length": 48, "batch_size": 2, "steps": 4, "learning_rate": 1e-2, "dtype": "fp32", "log_every": 1}
    settings = TrainSettings(**{**asked, "save_every": 3, "stream": stream, **changes})
    return cogsym.train(folder, [source], out, plan=plan, evaluate={"sw": source}, settings=settings, resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def check_same(got: cogsym.TrainResult, want: cogsym.TrainResult) -> None:
    histories = [[{**line, "tokens_per_second": 0} for line in result.history] for result in (got, want)]
    assert histories[0] == histories[1]
    ours, theirs = weights(got.folder), weights(want.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    for name in ("config.json", "generation_config.json"):
        assert (got.folder / name).read_text() == (want.folder / name).read_text()
    _, info = AutoModelForCausalLM.from_pretrained(got.folder, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("qwen2", {"keep": "input"}),
        ("llama-tied-gelu", {"keep": "nothing", "lora_rank": 2, "accumulation": 2}),
        ("granite", {"keep": "all", "plan": LayerPlan.layers(LAYERS, "2,5")}),
        ("llama-tied-gelu", {"plan": LayerPlan.outer(LAYERS, embeddings=True, head=True, final_norm=True)}),
    ],
    ids=["qwen2", "lora", "below-and-above", "embeddings"],
)
def test_a_streamed_run_is_the_resident_one_bit_for_bit(
    model_folder: Path, text_file: Path, tmp_path: Path, variant: str, changes: dict[str, Any]
) -> None:
    folder = folder_of(model_folder, variant)
    want = run(folder, text_file, tmp_path / "resident", False, **changes)
    got = run(folder, text_file, tmp_path / "streamed", True, **changes)
    check_same(got, want)
    assert {p.device.type for p in got.model.parameters()} == {"cpu", "meta"}


@pytest.mark.parametrize("widened", [False, True])
def test_weights_in_16_bits_stay_as_they_are_stored(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widened: bool
) -> None:
    monkeypatch.setattr(precision, "should_widen", lambda *_: widened)
    folder = folder_of(model_folder, "llama-biases", torch.bfloat16)
    want = run(folder, text_file, tmp_path / "resident", False, dtype="auto")
    got = run(folder, text_file, tmp_path / "streamed", True, dtype="auto")
    check_same(got, want)
    base, now = weights(folder), weights(got.folder)
    moved = {name.split(".")[2] for name in base if not torch.equal(base[name], now[name])}
    assert moved == {"0", "6"}


def test_a_streamed_run_resumes_and_may_go_on_in_memory(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    folder = folder_of(model_folder, "llama")
    whole = run(folder, text_file, tmp_path / "whole", False)
    for first, second in ((True, True), (True, False), (False, True)):
        out = tmp_path / f"{first}{second}"
        with killed_in_step(4):
            run(folder, text_file, out, first)
        check_same(run(folder, text_file, out, second, resume=True), whole)


def prepared(folder: Path, plan: LayerPlan, **options: Any) -> Any:
    return cogsym.prepare(cogsym.load_streamed(folder, plan), plan, **options).train()


def step(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@pytest.mark.parametrize("keep", ["input", "nothing"])
def test_each_layer_is_read_ahead_and_no_more_often_than_needed(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    plan = LayerPlan.outer(LAYERS, front=1, back=1)
    model = prepared(folder_of(model_folder, "llama"), plan, keep=keep)
    begun: list[int] = []
    fill = streamed._Reader._fill
    monkeypatch.setattr(streamed._Reader, "_fill", lambda *args: (begun.append(args[2]), fill(*args))[1])
    step(model).backward()
    step(model).backward()
    learned = len(begun)
    step(model).backward()
    n = LAYERS - 2
    if keep == "input":  # the last two are there when the pass turns, and the first two when the next step begins
        assert begun[learned:] == [*range(3, n + 1), *range(n - 2, 0, -1)]
    read = sum(map(len, [begun])) - learned
    step(model).backward()
    assert len(begun) - learned == 2 * read  # nothing that was read in vain, or the numbers would drift


def test_no_more_than_two_layers_are_in_memory(model_folder: Path) -> None:
    plan = LayerPlan.outer(LAYERS, front=1, back=1)
    model = prepared(folder_of(model_folder, "llama"), plan)
    step(model).backward()
    blocks = [block for layer in model.model.layers if (block := streamed.on_disk(layer))]
    slots = blocks[0]._reader._slots
    assert len(blocks) == LAYERS - 2
    assert sum(len(slot.memory) for slot in slots) == 2 * blocks[0].nbytes
    assert all(p.is_meta for block in blocks for p in block._filled.parameters())


def test_a_loop_of_ones_own(model_folder: Path, tmp_path: Path) -> None:
    folder, plan = folder_of(model_folder, "qwen3"), LayerPlan.outer(LAYERS)
    resident = cogsym.prepare(AutoModelForCausalLM.from_pretrained(folder), plan).train()
    model = prepared(folder, plan)
    assert [*model.state_dict()] == [*resident.state_dict()]
    losses = []
    for each in (model.to("cpu"), resident):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for i in range(3):
            loss = step(each, i)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        each.eval()
        with torch.no_grad():
            losses[-1].append(step(each, 9).item())
    assert losses[0] == losses[1]
    assert "frozen and on disk" in str(cogsym.explain(model))
    for each, name in ((model, "streamed"), (cogsym.restore(resident), "resident")):
        each.save_pretrained(tmp_path / name)
    ours, theirs = weights(tmp_path / "streamed"), weights(tmp_path / "resident")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_dry_run_says_what_stays_on_disk(model_folder: Path, text_file: Path, tmp_path: Path, capfd: Any) -> None:
    settings = TrainSettings(length=48, batch_size=2, steps=2, stream=True)
    dry_run(folder_of(model_folder, "llama"), [Source(text_file, field="sw")], tmp_path / "out", settings=settings)
    assert "GB of 5 frozen layers stay on disk" in capfd.readouterr().err


def test_what_cannot_be_streamed(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = LayerPlan.outer(LAYERS, front=1, back=1), folder_of(model_folder, "llama")
    model = prepared(folder, plan)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(CogsymError, match=r"Layer 1 is read from disk .* cache"):
        model.eval()(input_ids=ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(CogsymError, match="plan trains layer 1, whose weights are on disk"):
        cogsym.prepare(model, LayerPlan.outer(LAYERS, front=2, back=1))
    hook = model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(CogsymError, match=r"Layer 2 .*\(a hook on Linear must fire"):
        step(model.train())
    hook.remove()
    step(model).backward()
    file = next(folder.glob("model-00004*"))
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CogsymError, match=f"{file.name} has changed since the model was opened"):
        step(model).backward()
    with pytest.raises(CogsymError, match="has changed"):
        model.save_pretrained(tmp_path / "saved")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    step(model).backward()  # put back as it was
    aside = file.rename(tmp_path / "aside")
    with pytest.raises(CogsymError, match=f"{file.name} is gone"):
        step(model).backward()
    aside.rename(file)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(CogsymError, match="in one process and this is one of several"):
            cogsym.load_streamed(folder, plan)
    with pytest.raises(CogsymError, match="'somebody/model' is none; download it first"):
        cogsym.load_streamed("somebody/model", plan)
    settings = TrainSettings(stream=True)
    with pytest.raises(CogsymError, match="given a model in memory"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        cogsym.train(loaded, [Source(text_file, field="sw")], tmp_path / "out", tokenizer=object(), settings=settings)
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CogsymError, match=r"holds no \.safetensors file"):
        cogsym.load_streamed(folder, plan)


# Each in a forked process with everything imported, so that what is there already is the same. Frozen weights: 101 MB.
LIMITED = """
import json, os, resource, sys
import torch, cogsym
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder, room = sys.argv[1], 100 * 10**6
shape = dict(hidden_size=256, intermediate_size=2048, num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=24, tie_word_embeddings=True)).save_pretrained(folder)
plan = cogsym.LayerPlan.outer(24, front=1, back=1)

def losses(load):
    model = cogsym.prepare(load(), plan, keep="input").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for seed in range(2):
        ids = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found

def alone(load, limited):
    reading, writing = os.pipe()
    if not os.fork():
        try:
            if limited:
                data = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData:")) * 1024
                resource.setrlimit(resource.RLIMIT_DATA, (data + room,) * 2)
            result = losses(load)
        except (RuntimeError, MemoryError) as error:
            result = f"out of memory: {error}"
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    return json.loads(os.fdopen(reading).read())

in_memory = lambda: AutoModelForCausalLM.from_pretrained(folder)
on_disk = lambda: cogsym.load_streamed(folder, plan)
print(json.dumps([alone(in_memory, False), alone(in_memory, True), alone(on_disk, True)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_model_larger_than_the_memory_allowed_trains_to_the_same_losses(tmp_path: Path) -> None:
    """The operating system refuses the process more than 100 MB beside what it has; frozen weights are 161 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    unlimited, refused, streamed_losses = json.loads(done.stdout.splitlines()[-1])
    assert len(unlimited) == 2 and streamed_losses == unlimited
    assert "memory" in refused
