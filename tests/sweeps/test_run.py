"""A whole sweep against plain transformers models, resumed, killed, short of memory, and given what it cannot take."""

from __future__ import annotations

import copy
import json
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import in_child
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from sweeps.plain import greedy_tokens, log_probabilities, plain_model
from texts import sentences
from tiny_models import tiny_model

import cogsym
from cogsym import CogsymError, Configuration, RunStopped, SweepSettings
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps import run as module
from cogsym.sweeps.choose import Stops
from cogsym.sweeps.configs import configurations, distinct
from cogsym.sweeps.engine import Engine
from cogsym.sweeps.requests import Score, Scored
from cogsym.sweeps.results import frame
from cogsym.sweeps.tasks import load_task

L, CONTEXT = 4, 64
SMALL = SweepSettings(memory_budget=1)  # a document a piece


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """One of each kind, on a few made-up documents."""
    chance, lines = random.Random(0), sentences(60, seed=3)
    rows = [
        {"sw": a, "en": " ".join(b.split()[:3]), "wrong": c, "label": chance.randrange(2)}
        for a, b, c in zip(lines[:20], lines[20:40], lines[40:], strict=True)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    text = {"name": "text", "kind": "text", "data": f"{file}#sw", "language": "sw", "limit": 7}
    choice = {
        "name": "choice", "kind": "choice", "data": str(file), "template": "{en} {option}",
        "options": ["{sw}", "{wrong}"], "label": "label", "limit": 6,
    }  # fmt: skip
    translation = {
        "name": "translation", "kind": "translation", "side": "production", "data": str(file), "language": "sw",
        "template": "{en} = {sw}", "max_new_tokens": 6, "limit": 5, "stops": ["a"],
    }  # fmt: skip
    return [text, choice, translation]


@pytest.fixture
def sweep(model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`cogsym.sweep` of the tiny model into tmp_path/out; what it says is kept at `.said`."""

    def run(configs: Any, tasks: Any, model: Any = model_folder, out: Path = tmp_path / "out", **more: Any) -> Any:
        console = Console(file=StringIO(), width=80)
        try:
            return cogsym.sweep(model, configs, tasks, out, console=console, **more)
        finally:
            run.said = console.file.getvalue()  # type: ignore[attr-defined]

    return run


def by_row(folder: Path) -> Any:
    told = frame(folder)
    names = ["configuration", "task", "document", "metric"]
    assert not told.duplicated(names).any()
    return told.fillna({"text": ""}).set_index(names).sort_index()


def assert_same_rows(a: Path, b: Path) -> None:
    one, other = by_row(a), by_row(b)
    assert one.index.equals(other.index)
    assert one["value"].to_numpy().tobytes() == other["value"].to_numpy().tobytes()
    assert [tuple(s) for s in one["statistics"]] == [tuple(s) for s in other["statistics"]]
    assert one["text"].tolist() == other["text"].tolist()


def asked(sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *args: Any, **more: Any) -> set[Any]:
    """The (task, document, configuration) that a sweep computes."""
    pairs: list[Any] = []
    rows = module._Sweep._rows

    def watched(self: Any, task: Any, piece: Any, trie: Any) -> Any:
        pairs.extend((task.name, d.key, c.code) for d in piece for c in trie.configurations)
        return rows(self, task, piece, trie)

    with monkeypatch.context() as patch:
        patch.setattr(module._Sweep, "_rows", watched)
        sweep(*args, **more)
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def plain_rows(folder: Path, chosen: list[Configuration], tasks: Any, base: Any = None) -> dict[Any, Any]:
    """(configuration, task, document, metric) -> Measure, from a model of its own for each configuration."""
    whole, tokenizer = load_model(folder), load_tokenizer(folder)
    stops, rows = Stops(tokenizer, [tokenizer.eos_token_id]), {}
    for configuration in chosen:
        model = plain_model(whole, configuration, base).eval()
        for task in map(load_task, tasks):
            for document in task.documents(tokenizer, CONTEXT):
                outcomes: list[Any] = []
                for request in document.requests:
                    if isinstance(request, Score):
                        log_p = log_probabilities(model, request.tokens)[request.first - 1 :]
                        outcomes.append(Scored(float(log_p.sum()), False, len(log_p)))
                        continue
                    tokens = greedy_tokens(model, request.tokens, request.max_new_tokens, tokenizer.eos_token_id)
                    ends = (stops.ended(request, tokens[: i + 1]) for i in range(len(tokens)))
                    outcomes.append(next(end for end in ends if end is not None))
                for measure in task.measure(document, outcomes):
                    rows[configuration.code, task.name, document.key, measure.metric] = measure
    return rows


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
    """The whole sweep with SIGKILL, resumed, killed again; finished, the rows are those of an undisturbed run."""
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)

    def whole(out: Path) -> None:
        started = any((out / "results").glob("part-*"))
        sweep("grid", tasks, out=out, settings=SMALL, resume=started)

    undisturbed = tmp_path / "undisturbed"
    begin = time.monotonic()
    assert in_child(partial(whole, undisturbed)) == 0
    seconds = time.monotonic() - begin
    assert len(list(undisturbed.rglob("part-*"))) == 18
    finished, kills, parts = 0, 0, []
    while kills < 20:
        out = tmp_path / f"killed-{finished}"
        status = in_child(partial(whole, out), chance.uniform(0.05, 0.9) * seconds)
        if status == 0:
            assert_same_rows(out, undisturbed)
            finished += 1
        else:
            assert status == -signal.SIGKILL
            kills += 1
            parts.append(len(list(out.rglob("part-*"))))
    print("parts at each kill:", parts)
    assert len(set(parts)) > 3
    out = tmp_path / f"killed-{finished}"
    whole(out)
    assert_same_rows(out, undisturbed)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_pieces_that_do_not_fit_are_halved(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run, sizes = Engine.run, []

    def small(self: Any, trie: Any, batch: Any, *more: Any) -> None:
        if len(batch.layout.tokens) > 40:
            raise error
        sizes.append(len(batch.layout.tokens))
        run(self, trie, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", small)
        sweep("input", tasks)
    assert "Out of memory with 7 documents; going on with 3 at a time." in sweep.said  # type: ignore[attr-defined]
    assert len(sizes) > 6
    sweep("input", tasks, out=tmp_path / "at once")
    one, other = by_row(tmp_path / "out"), by_row(tmp_path / "at once")
    assert one.index.equals(other.index)
    # Other products of matrices, so the last bits differ; what is written does not.
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-5, atol=1e-5)
    assert one["text"].tolist() == other["text"].tolist()


def test_a_document_that_does_not_fit(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Engine.run
    documents = load_task(tasks[0]).documents(load_tokenizer(tmp_path / "base"), CONTEXT)
    lengths = [len(d.requests[0].tokens) - 1 for d in documents]
    bad = max(range(1, 7), key=lengths.__getitem__)

    def small(self: Any, trie: Any, batch: Any, *more: Any) -> None:
        if max(map(len, batch.sequences)) >= lengths[bad]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, trie, batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", small)
        with pytest.raises(RunStopped, match="does not fit into memory under 5 configurations") as caught:
            sweep("input", tasks[:1])
    assert documents[bad].key in str(caught.value) and "task text" in str(caught.value)
    kept = set(by_row(tmp_path / "out").index.get_level_values("document"))
    assert kept == {d.key for d in documents[:bad]}
    sweep("input", tasks[:1], resume=True)
    assert len(by_row(tmp_path / "out")) == 7 * 5


def test_another_error_is_not_taken_for_one_of_memory(
    sweep: Callable[..., Any], tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "run", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        sweep("input", tasks)


def test_budgets_are_kept(sweep: Callable[..., Any], tasks: Any, model_folder: Path) -> None:
    """What pieces are said to take is at least what their states, keys and values are."""
    from cogsym.sweeps.costs import Costs, Sizes
    from cogsym.sweeps.layers import ResidentLayers
    from cogsym.sweeps.trie import Trie

    layers = ResidentLayers(load_model(model_folder))
    trie = Trie(configurations("grid", L))
    costs, tokenizer = Costs(Sizes.of(layers), trie), load_tokenizer(model_folder)
    documents = [d for task in tasks for d in load_task(task).documents(tokenizer, CONTEXT)]
    sizes = []
    for budget in (1, costs.of(documents[:3]), costs.of(documents[:9]), 10**12):
        left, pieces = documents, []
        while left:
            number = costs.piece(left, budget, large=True)
            pieces.append(left[:number])
            assert number == 1 or costs.of(left[:number]) <= budget
            assert number == len(left) or costs.of(left[: number + 1]) > budget
            left = left[number:]
        assert [d for piece in pieces for d in piece] == documents
        sizes.append(len(pieces))
    assert sizes[0] == len(documents) and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)
    prompts = documents[-2:]
    held = sum(t.numel() * t.element_size() for t in stores(layers, trie, prompts))
    assert 0 < held <= costs.of(prompts)


def stores(layers: Any, trie: Any, documents: Any) -> list[torch.Tensor]:
    """The keys and values that generation allocates."""
    from cogsym.sweeps import generate as generating
    from cogsym.sweeps.choose import Sampling
    from cogsym.sweeps.heads import SweepHead
    from cogsym.sweeps.requests import Generate

    requests = [r for d in documents for r in d.requests if isinstance(r, Generate)]
    stops = Stops(load_tokenizer_of(layers), [])
    decoder = generating._Decoder(Engine(layers), SweepHead(layers.model), trie, requests, stops, Sampling())
    with torch.inference_mode():
        decoder.run()
    return [t for store in decoder._stores.values() for t in (store.k, store.v)]


def load_tokenizer_of(layers: Any) -> Any:
    return load_tokenizer(layers.model.config.name_or_path)


@pytest.mark.parametrize(("number", "better"), [(0, min), (1, max)])
def test_greedy_removes_what_is_missed_least(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: int, better: Any,
) -> None:  # fmt: skip
    """Bits per byte are to stay low, a margin high; the choice of each round is that of plain models."""
    task = {**tasks[number], "metrics": ["bits_per_byte" if better is min else "margin"]}
    forwards: list[float] = []
    progress = module.SweepProgress.forwards
    monkeypatch.setattr(module.SweepProgress, "forwards", lambda s, n: (forwards.append(n), progress(s, n))[0])
    told = sweep("greedy", [task], settings=SweepSettings(remove=3))
    said = sweep.said  # type: ignore[attr-defined]
    assert "10 configurations in 3 rounds" in said
    # The whole model and those without one layer: 4 + 3 + 2 + 1. Then, of R left, (R - 1)(R + 2) / 2.
    assert sum(forwards) == planned(said) == 10 + 5 + 2
    gone: list[int] = []
    for _ in range(3):
        tried = {i: Configuration.of(L, {"skip": [*gone, i]}) for i in range(L) if i not in gone}
        rows = plain_rows(model_folder, list(tried.values()), [task])
        sums: dict[str, Any] = {}
        for (code, *_), measure in rows.items():
            sums[code] = sums.get(code, 0) + np.array(measure.statistics)
        best = better(tried, key=lambda i: sums[tried[i].code][0] / sums[tried[i].code][1])
        gone.append(best)
        assert f"layer {best} goes: " in said
    assert f"{told['configuration'].nunique()}" == "10"
    assert not asked(sweep, monkeypatch, "greedy", [task], settings=SweepSettings(remove=3), resume=True)
    fourth = asked(sweep, monkeypatch, "greedy", [task], settings=SweepSettings(remove=4), resume=True)
    assert {code for _, _, code in fourth} == {"ssss"}


def planned(said: str) -> float:
    return float(said.partition("layer-forwards: ")[2].partition(",")[0])


def test_greedy_goes_on_where_it_was_killed(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the layers go by default, and halves of layers may."""
    settings = SweepSettings(action="skip_mlp", memory_budget=1)
    sweep("greedy", tasks, settings=settings, out=tmp_path / "whole")
    want = [line for line in sweep.said.splitlines() if "goes" in line]  # type: ignore[attr-defined]
    assert len(want) == 2
    parts = len(list((tmp_path / "whole").rglob("part-*")))
    assert parts == 2 * 18
    for number in (3, 20):
        append, left = module.Results.append, iter(range(number))

        def dying(self: Any, rows: Any, append: Any = append, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            append(self, rows)

        with monkeypatch.context() as patch, pytest.raises(RunStopped, match="--resume"):
            patch.setattr(module.Results, "append", dying)
            sweep("greedy", tasks, settings=settings, out=tmp_path / str(number))
        sweep("greedy", tasks, settings=settings, out=tmp_path / str(number), resume=True)
        assert [line for line in sweep.said.splitlines() if "goes" in line] == want  # type: ignore[attr-defined]
        assert_same_rows(tmp_path / str(number), tmp_path / "whole")


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
