"""A whole sweep against plain transformers models, resumed, killed, and given what it cannot take."""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from children import in_child
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sweeps.runs import SMALL, L, asked, assert_same_rows, by_row, plain_rows
from tiny_models import tiny_model

import cogsym
from cogsym import CogsymError, Configuration, SweepSettings
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.layers.configurations import configurations, distinct


def test_rows_are_those_of_plain_models(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path
) -> None:
    base_folder = tmp_path / "before"
    base = tiny_model("llama", vocab_size=300, seed=7, initializer_range=0.2)
    base.save_pretrained(base_folder)
    configs = ["grid", {"revert": "1-2", "skip_mlp": 0}, {"skip_attention": [3]}, {"revert": "0-3"}]
    told = sweep(configs, tasks, base=base_folder)
    chosen, merged = distinct(configurations(configs, L))
    want, rows = plain_rows(model_folder, chosen, tasks, base), by_row(tmp_path / "out")
    assert merged == 4 and ", 4 duplicates merged\n" in sweep.said  # type: ignore[attr-defined]
    assert len(rows) == len(want)
    texts = set()
    for place, measure in want.items():
        row = rows.loc[place]
        np.testing.assert_allclose(row["value"], measure.value, rtol=2e-5, atol=2e-5, err_msg=str(place))
        np.testing.assert_allclose(row["statistics"], measure.statistics, rtol=2e-5, atol=2e-4)
        assert row["text"] == (measure.text or "")
        texts.add(measure.text)
    assert len(texts) > 30  # the configurations differ in what they write
    assert set(rows["model"]) == {str(model_folder)} and set(rows["language"]) == {"sw", "und"}
    assert told["configuration"].nunique() == len(chosen)
    line = told[(told["metric"] == "bits_per_byte") & (told["task"] == "text") & (told["direction"] == "none")]
    whole = [want["....", "text", d, "bits_per_byte"].statistics for t, d in rows.loc["...."].index.droplevel(2).unique() if t == "text"]  # fmt: skip  # noqa: E501
    nats, size = np.array(whole).sum(0)
    assert line["documents"].item() == 7
    assert line["value"].item() == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_the_plan(sweep: Callable[..., Any], tasks: Any, tmp_path: Path) -> None:
    assert sweep("input,output", tasks, dry_run=True) is None
    said = sweep.said  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()
    assert said.startswith("8 configurations, 2 duplicates merged\n")
    # The first k skipped: 4 + 3 + 2 + 1, and what the last skipped leave is on the way of the whole model.
    assert (
        "layer-forwards: 10, where a loop over the kept layers needs 16 and one that computes and discards 32; " in said
    )
    assert "head-forwards: 8\n" in said
    assert "18 documents in 3 pieces, at most " in said and " live states, " in said
    assert said.splitlines()[-1].startswith("about ") and said.endswith(" s\n")
    sweep([{}], tasks[:1], dry_run=True)
    said = sweep.said  # type: ignore[attr-defined]
    assert said.startswith("1 configuration\n") and "7 documents in 1 piece, at most 1 live state, " in said
    assert "Warning: the task text has 7 documents; intervals from fewer than 10 mean little.\n" in said
    sweep([{}], [{**tasks[0], "limit": 10}], dry_run=True)
    assert "Warning" not in sweep.said  # type: ignore[attr-defined]
    sweep("input", tasks, dry_run=True, settings=SMALL)
    assert "18 documents in 18 pieces" in sweep.said  # type: ignore[attr-defined]


def test_resumed_it_computes_only_what_is_missing(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked(sweep, monkeypatch, "input", tasks[:2])
    assert len(first) == 13 * (L + 1)
    parts = sorted((tmp_path / "out").rglob("part-*"))
    assert not asked(sweep, monkeypatch, "input", tasks[:2], resume=True)
    assert sorted((tmp_path / "out").rglob("part-*")) == parts
    more_configurations = asked(sweep, monkeypatch, "input,output", tasks[:2], resume=True)
    assert len(more_configurations) == 13 * (L - 1) and not more_configurations & first
    more_tasks = asked(sweep, monkeypatch, "input,output", tasks, resume=True)
    assert len(more_tasks) == 5 * 2 * L and {task for task, _, _ in more_tasks} == {"translation"}
    parts = sorted((tmp_path / "out").rglob("part-*"))
    parts[0].unlink()
    again = asked(sweep, monkeypatch, "input,output", tasks, resume=True)
    assert again == {pair for pair in first if pair[0] == "text"}
    sweep("input,output", tasks, out=tmp_path / "at once")
    one, other = by_row(tmp_path / "out"), by_row(tmp_path / "at once")
    assert one.index.equals(other.index)
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-5, atol=1e-5)


def test_more_documents_on_resume(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a larger limit, or by lines that are added to the data: what was there is kept, and nothing else is asked."""
    file = tmp_path / "rows.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:4]), "utf-8")
    first = asked(sweep, monkeypatch, "output", tasks, settings=SMALL)
    file.write_text("".join(lines), "utf-8")
    fewer = [task | {"limit": 5} for task in tasks]
    second = asked(sweep, monkeypatch, "output", fewer, resume=True, settings=SMALL)
    assert len(first) == 3 * 4 * (L + 1) and len(second) == 3 * (L + 1)
    third = asked(sweep, monkeypatch, "output", tasks, resume=True, settings=SMALL)
    assert len(third) == (2 + 1) * (L + 1)
    sweep("output", tasks, out=tmp_path / "at once", settings=SMALL)
    assert_same_rows(tmp_path / "out", tmp_path / "at once")
    with pytest.raises(CogsymError, match=r"was started with other data, documents 7 \(now 5\) in text, other"):
        sweep("output", fewer, resume=True)
    file.write_text("".join([lines[1], *lines[1:]]), "utf-8")
    more = [task | {"limit": 9} for task in tasks]
    with pytest.raises(CogsymError, match=r"was started with other data in text, other data in choice, other"):
        sweep("output", more, resume=True)


def test_models_in_memory_are_left_as_they_were(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(model_folder).train(), load_tokenizer(model_folder)
    model.model.norm.eval()
    before = {name: (p, p.data_ptr(), p.clone(), p.stride()) for name, p in model.named_parameters()}
    configs = ["input", {"revert": [2], "skip": [0]}]
    base = tiny_model("llama", vocab_size=300, seed=7, initializer_range=0.2).train()
    sweep(configs, tasks, model=model, tokenizer=tokenizer, base=base, out=tmp_path / "memory")
    assert model.training and not model.model.norm.training and base.model.layers[0].training
    for name, p in model.named_parameters():
        was, _, value, stride = before[name]
        assert p is was and torch.equal(p, value) and p.stride() == stride
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
    base.save_pretrained(tmp_path / "before")
    sweep(configs, tasks, base=tmp_path / "before")
    assert_same_rows(tmp_path / "out", tmp_path / "memory")


def test_adapters_are_merged_and_reverted(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer, plain = load_tokenizer(model_folder), load_model(model_folder)
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["q_proj", "down_proj"], r=3))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    configs = [{}, {"revert": [0, 2]}, {"revert": "0-3"}, {"skip": [1]}]
    sweep(configs, tasks, model=adapted, tokenizer=tokenizer, out=tmp_path / "adapted")
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())
    merged = copy.deepcopy(adapted).merge_and_unload()
    sweep(configs, tasks, model=merged, base=plain, tokenizer=tokenizer)
    assert_same_rows(tmp_path / "out", tmp_path / "adapted")
    rows = by_row(tmp_path / "out")["value"]
    sweep([{}], tasks, model=plain, tokenizer=tokenizer, out=tmp_path / "plain")
    whole = by_row(tmp_path / "plain")["value"]
    np.testing.assert_allclose(rows.loc["rrrr"], whole.loc["...."], rtol=1e-5, atol=1e-5)
    assert abs(rows.loc["...."] - whole.loc["...."]).max() > 0.01
    sweep([{}], tasks, model=adapted, tokenizer=tokenizer, out=tmp_path / "one")
    np.testing.assert_allclose(by_row(tmp_path / "one")["value"], rows.loc[["...."]], rtol=1e-5, atol=1e-5)


def test_killed_at_20_random_moments(sweep: Callable[..., Any], tasks: Any, tmp_path: Path) -> None:
    """The whole sweep with SIGKILL, resumed, killed again; finished, the rows are those of an undisturbed run.

    Starting is most of so small a sweep: half of the moments lie anywhere, half where rows are written.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)

    def parts_of(out: Path) -> int:
        return len(list(out.rglob("part-*")))

    def whole(out: Path, lingering: float | None = None) -> None:
        before = parts_of(out)

        def kill_behind_the_next_part() -> None:
            while parts_of(out) == before:
                time.sleep(0.002)
            time.sleep(lingering or 0.0)
            os.kill(os.getpid(), signal.SIGKILL)

        if lingering is not None:
            threading.Thread(target=kill_behind_the_next_part, daemon=True).start()
        sweep("grid", tasks, out=out, settings=SMALL, resume=before > 0)

    undisturbed = tmp_path / "undisturbed"
    begin = time.monotonic()
    assert in_child(partial(whole, undisturbed)) == 0
    seconds = time.monotonic() - begin
    assert parts_of(undisturbed) == 18
    finished, kills, parts = 0, 0, []
    while kills < 20:
        out = tmp_path / f"killed-{finished}"
        if kills % 2:
            status = in_child(partial(whole, out, chance.uniform(0, 0.1 * seconds)))
        else:
            status = in_child(partial(whole, out), chance.uniform(0.05, 0.9) * seconds)
        if status == 0:
            assert_same_rows(out, undisturbed)
            finished += 1
        else:
            assert status == -signal.SIGKILL
            kills += 1
            parts.append(parts_of(out))
    print("parts at each kill:", parts)
    assert len(set(parts)) > 3
    out = tmp_path / f"killed-{finished}"
    whole(out)
    assert_same_rows(out, undisturbed)


def test_a_model_and_a_tokenizer_that_disagree(sweep: Callable[..., Any], tasks: Any, model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder)
    with pytest.raises(CogsymError, match="use the tokenizer that belongs to the model"):
        sweep("input", tasks, model=tiny_model("llama"), tokenizer=tokenizer)


def test_a_model_that_is_prepared(sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    cogsym.prepare(model, cogsym.LayerPlan.outer(L))
    with pytest.raises(CogsymError, match=r"prepared for training; call cogsym.restore\(model\) before a sweep"):
        sweep("input", tasks, model=model, tokenizer=tokenizer)
    cogsym.restore(model)
    sweep("input", tasks, model=model, tokenizer=tokenizer)
    sweep("input", tasks, out=tmp_path / "plain")
    assert_same_rows(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_a_model_that_is_offloaded(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path, offload: Callable[..., Any]
) -> None:
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    offload(model, *([tmp_path / "weights"] if offload is disk_offload else []), execution_device=torch.device("cpu"))
    with pytest.raises(CogsymError, match=r"Weights of the LlamaForCausalLM are not in memory.* a layer at a time"):
        sweep("input", tasks, model, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_calls_that_cannot_be(sweep: Callable[..., Any], tasks: Any, model_folder: Path) -> None:
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    with pytest.raises(CogsymError, match="pass tokenizer="):
        sweep("input", tasks, model=model)
    with pytest.raises(CogsymError, match="no task"):
        sweep("input", [])
    with pytest.raises(CogsymError, match="Two tasks are named text"):
        sweep("input", [tasks[0], tasks[0]])
    with pytest.raises(CogsymError, match="name a folder"):
        sweep("input", tasks, model=model, tokenizer=tokenizer, settings=SweepSettings(stream=True))
    with pytest.raises(CogsymError, match="base from a folder too"):
        sweep([{"revert": [0]}], tasks, base=model, settings=SweepSettings(stream=True))
    with pytest.raises(CogsymError, match="for 3 layers, expected 4"):
        sweep([Configuration(("keep",) * 3)], tasks)


def test_a_base_that_is_not_needed(sweep: Callable[..., Any], tasks: Any, tmp_path: Path) -> None:
    sweep("input", tasks[:1], base=tmp_path / "nowhere")
    assert "No configuration reverts a layer: the base checkpoint is left aside." in sweep.said  # type: ignore[attr-defined]


def test_results_of_other_weights_or_another_tokenizer(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path
) -> None:
    sweep("input", tasks[:1])
    tokenizer, config = model_folder / "tokenizer.json", model_folder / "tokenizer_config.json"
    text, settings = tokenizer.read_text("utf-8"), config.read_text("utf-8")
    tokenizer.write_text(text.replace('"<end>"', '"<done>"'), "utf-8")
    config.write_text(settings.replace("<end>", "<done>"), "utf-8")
    with pytest.raises(CogsymError, match="was started with tokenizer"):
        sweep("input", tasks[:1], resume=True)
    tokenizer.write_text(text, "utf-8")
    config.write_text(settings, "utf-8")
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CogsymError, match="holds results of another model: revision"):
        sweep("input", tasks[:1], resume=True)
