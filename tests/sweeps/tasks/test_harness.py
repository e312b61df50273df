"""Tasks of lm-evaluation-harness under every configuration, against its own HFLM over a plain model of each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps.plain import plain_model
from texts import sentences

from cogsym import CogsymError, Configuration
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.results.plots import plot
from cogsym.sweeps.results.store import summary

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[lm_eval]'")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cogsym.sweeps.lm import LM

CODES = ["....", "s...", "..s.", "ss.."]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A task file of each sort over one local file: options, running text longer than the context, and writing."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = sentences(24, seed=5)
    rows = [
        {"question": a, "right": b, "wrong": c, "answer": i % 2, "long": " ".join([a, b, c] * 4)}
        for i, (a, b, c) in enumerate(zip(lines[:8], lines[8:16], lines[16:], strict=True))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choice = {
        "task": "local_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{[right, wrong]}}", "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ] + [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}],
    }  # fmt: skip
    rolling = {"task": "local_text", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "long"}
    writing = {
        "task": "local_writing", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "right", "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 9},
        "metric_list": [
            {"metric": name, "aggregation": name, "higher_is_better": True} for name in ("bleu", "chrf", "chrf++")
        ],
    }  # fmt: skip
    paths = []
    for task in (choice, rolling, writing):
        paths.append(tmp_path / f"{task['task']}.yaml")
        paths[-1].write_text(yaml.safe_dump(common | task), "utf-8")
    return paths


def evaluated(lm: Any, files: list[Path], limit: int) -> dict[str, dict[str, Any]]:
    found = simple_evaluate(
        lm, tasks=[str(file) for file in files], limit=limit, bootstrap_iters=0, log_samples=False,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    assert found is not None
    return {
        task: {name: value for name, value in of.items() if "," in name and "stderr" not in name}
        for task, of in found["results"].items()
    }


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_every_configuration_is_hflm_s_over_a_plain_model(
    sweep: Callable[..., Any], files: list[Path], model_folder: Path, tmp_path: Path
) -> None:
    asked = [{"skip": [i for i, letter in enumerate(code) if letter == "s"]} for code in CODES]
    sweep(asked, [f"lm_eval:{file},limit=6" for file in files])
    out = tmp_path / "out"
    assert "f1 of the task local_choice is no sum" in sweep.said  # type: ignore[attr-defined]
    ours = json.loads((out / "lm_eval.json").read_text())
    assert list(ours) == CODES
    whole, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    rows = summary(out).set_index(["configuration", "task", "metric"])["value"]
    for code in CODES:
        configuration = Configuration(tuple("skip" if letter == "s" else "keep" for letter in code))
        model = plain_model(whole, configuration)
        # HFLM drops the text of an end that the model itself does not name, and a row goes on while others do.
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        plain = HFLM(model, tokenizer=tokenizer, batch_size=3)
        theirs = evaluated(plain, files, 6)
        again = evaluated(LM(out, code), files, 6)
        for task, values in theirs.items():
            mine = {name: value for name, value in ours[code][task].items() if "," in name}
            assert_equal(mine, values)
            assert_equal(again[task], values)
            for name, value in values.items():
                assert name == "f1,none" or math.isclose(rows[code, task, name], value, rel_tol=2e-5, abs_tol=1e-6)
    assert len({json.dumps(ours[code]) for code in CODES}) == len(CODES)
    assert plot(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["local_group", "local_tag"])
def test_a_group_and_a_tag_are_their_tasks(
    sweep: Callable[..., Any], files: list[Path], model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    """A group's own mean, weighted by its tasks' sizes, is there too, and is what the harness says."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choice = yaml.safe_load(files[0].read_text())
    del choice["metric_list"][1:]
    rows = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    halves = {"local_a": rows[:5], "local_b": rows[5:]}
    for task, lines in halves.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(lines), "utf-8")
        data = {"data_files": {"test": str(tmp_path / f"{task}.jsonl")}}
        of = choice | {"task": task, "tag": "local_tag", "dataset_kwargs": data}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(of), "utf-8")
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "local_group", "task": list(halves), "aggregate_metric_list": [mean]}
    (folder / "local_group.yaml").write_text(yaml.safe_dump(group), "utf-8")
    manager = partial(TaskManager, include_defaults=False)  # thousands of others take seconds
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_path, include_defaults: manager(include_path=include_path)
    )
    sweep([{}], [f"lm_eval:{name},include_path={folder}"])
    ours = json.loads((tmp_path / "out" / "lm_eval.json").read_text())["...."]
    plain = HFLM(load_model(model_folder), tokenizer=load_tokenizer(model_folder))
    known = manager(include_path=str(folder))
    found = simple_evaluate(plain, tasks=[name], bootstrap_iters=0, task_manager=known)
    theirs = found["results"] | found.get("groups", {})
    assert list(ours) == [*halves, *(["local_group"] if name == "local_group" else [])] and ours.keys() == theirs.keys()
    for task, of in theirs.items():
        assert ours[task]["acc,none"] == pytest.approx(of["acc,none"])
    assert set(summary(tmp_path / "out")["task"]) == set(halves)


@pytest.mark.filterwarnings("ignore")
def test_resumed_nothing_is_asked_again(sweep: Callable[..., Any], files: list[Path], tmp_path: Path) -> None:
    spec = f"lm_eval:{files[0]},limit=3"
    sweep([{}], [spec])
    sweep([{}, {"skip": [1]}], [spec], resume=True)
    assert list(json.loads((tmp_path / "out" / "lm_eval.json").read_text())) == ["....", ".s.."]
    sweep([{}], [f"lm_eval:{files[0]},limit=5"], resume=True)
    told = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    sweep([{}], [f"lm_eval:{files[0]},limit=5"], out=tmp_path / "at once")
    at_once = json.loads((tmp_path / "at once" / "lm_eval.json").read_text())
    assert told["...."]["local_choice"] == pytest.approx(at_once["...."]["local_choice"])
    assert told["...."]["local_choice"]["sample_len"] == 5
    with pytest.raises(CogsymError, match="did not ask"):
        evaluated(LM(tmp_path / "out", "...."), files[:1], 6)
    with pytest.raises(CogsymError, match="has no answers"):
        LM(tmp_path / "out", "sss.")
    with pytest.raises(CogsymError, match="other data"):
        sweep([{}], [f"lm_eval:{files[0]},limit=2"], resume=True)


def test_what_cannot_be_asked(sweep: Callable[..., Any], files: list[Path], tmp_path: Path) -> None:
    settings = yaml.safe_load(files[2].read_text())
    for bad, words in (
        ({"do_sample": True, "temperature": 0.7}, "temperature 0.7"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"max_gen_toks": 64}, "64 new tokens"),
    ):
        settings["generation_kwargs"] = {"until": ["a"], **bad}
        files[2].write_text(yaml.safe_dump(settings), "utf-8")
        with pytest.raises(CogsymError, match=words):
            sweep([{}], [f"lm_eval:{files[2]}"])
    for task, words in (
        (f"lm_eval:{tmp_path}/nowhere.yaml", "does not exist"),
        (f"lm_eval:{files[0]},shots=2", "setting 'shots'"),
        (f"lm_eval:{files[0]},limit=none", "whole number from 1"),
        (f"lm_eval:{files[0]},side=both", "The side 'both'"),
    ):
        with pytest.raises(CogsymError, match=words):
            sweep([{}], [task])
