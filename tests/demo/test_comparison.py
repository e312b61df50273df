import io
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cogsym import CogsymError, RunStopped
from cogsym.demo import comparison, language, semantics, tasks


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    report = comparison.run_demo(out, seed=3, steps=2, count=6, console=Console(file=text, width=120))
    return out, report, text.getvalue()


def test_demo_writes_its_files_with_finite_numbers(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = demo
    assert json.loads((out / "demo.json").read_text("utf-8")) == report
    assert all(map(math.isfinite, numbers(report)))
    assert len(numbers(report)) > 40
    assert Image.open(out / "demo.png").size[0] > 1000
    assert "<svg" in (out / "demo.svg").read_text("utf-8")
    assert "nw:2" in report["chrf_signature"]


def test_demo_prints_its_numbers(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, report, text = demo
    for label in comparison.LABELS.values():
        assert label in text
    for score in report["scores"].values():
        assert f"{score['bits_per_byte']:.2f}" in text
    assert report["sources"][0] in text
    assert " ".join(comparison.conclusion(report).split()) in " ".join(text.split())
    assert str(out) in text.replace("\n", "")


def test_demo_trains_what_it_says(demo: tuple[Path, dict[str, Any], str]) -> None:
    """CogSym changes the outer quarter of the layers, with the embeddings or without; full fine-tuning everything."""
    out, report, _ = demo
    with comparison.base_folder() as folder:
        base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    num_layers = AutoModelForCausalLM.from_pretrained(out / "full" / "model").config.num_hidden_layers
    outer = {f"model.layers.{i}." for i in (0, 1, num_layers - 2, num_layers - 1)}
    changed = {}
    for name in ("cogsym", "cogsym-embeddings", "full"):
        adapted = AutoModelForCausalLM.from_pretrained(out / name / "model", dtype=base["model.norm.weight"].dtype)
        changed[name] = {key for key, value in adapted.state_dict().items() if not value.equal(base[key])}
    assert changed["cogsym"]
    assert all(any(key.startswith(prefix) for prefix in outer) for key in changed["cogsym"])
    words = {"model.embed_tokens.weight", "lm_head.weight"} & base.keys()
    assert words and changed["cogsym-embeddings"] == changed["cogsym"] | words
    assert any(key.startswith("model.layers.7.") for key in changed["full"])
    assert report["training"]["full"]["trained_parameters"] == report["parameters"]


def test_demo_replaces_an_earlier_one(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, before, _ = demo
    report = comparison.run_demo(out, seed=4, steps=1, count=4, console=Console(file=io.StringIO()))
    assert report["seed"] != before["seed"]
    assert json.loads((out / "demo.json").read_text("utf-8"))["seed"] == 4


def test_demo_leaves_other_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a model that someone trained into a folder of the name that the demo's own has."""
    (tmp_path / "cogsym").mkdir()
    (tmp_path / "cogsym" / "settings.json").write_text("{}")
    with pytest.raises(CogsymError, match="holds files that no demo wrote; choose an empty or a new folder"):
        comparison.run_demo(tmp_path, steps=1, count=4, console=Console(file=io.StringIO()))
    assert [p.name for p in tmp_path.rglob("*")] == ["cogsym", "settings.json"]


def test_demo_replaces_one_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise RunStopped("stopped", 130)

    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(comparison, "ablate", stopped)
        comparison.run_demo(tmp_path / "out", steps=1, count=4, console=Console(file=io.StringIO()))
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(comparison, "train", stopped)  # it gets to where it trains
        comparison.run_demo(tmp_path / "out", steps=1, count=4, console=Console(file=io.StringIO()))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["demo.json"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "The demo was stopped; `cogsym demo` starts anew and replaces what "),
        (RunStopped("Stopped at step 3 of 5, and saved; --resume goes on.", 143), 143, "The demo was stopped; `cogsym"),
        (RunStopped("metrics.jsonl was not written (No space); run again with --resume."), 1,
         "metrics.jsonl was not written (No space); `cogsym demo` starts anew"),
    ],
)  # fmt: skip
def test_what_stops_the_demo_says_what_it_can_do(
    error: BaseException, status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(comparison, "train", stopped)
    with pytest.raises(RunStopped) as stop:
        comparison.run_demo(tmp_path, steps=1, count=4, console=Console(file=io.StringIO()))
    assert str(stop.value).startswith(message) and "--resume" not in str(stop.value)
    assert stop.value.exit_status == status


def test_training_and_test_share_no_meaning() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    with comparison.base_folder() as folder:
        items = tasks.held_out(AutoTokenizer.from_pretrained(folder), 100, seed)
    seen = {side for document in tasks.training_documents(4000, seed) for side in document.text.split(" = ")}
    assert not seen & {*items.references, *items.sources}


def test_the_demo_speaks_of_bare_meanings_and_knows_how_probable_they_are() -> None:
    drawn = list(itertools.islice(tasks.meanings("train", 1), 5000))
    assert not [m for m in drawn if m.place or m.subject.adjective or (m.object and m.object.adjective)]
    # The probabilities of all that can be drawn add up to 1: the mean of 1 / p over draws is their number.
    bare = [m for m in drawn if m.object is None]
    expected = sum(
        len(semantics.NOUNS[kind]) * 2 * 3
        for verb in semantics.VERBS.values()
        if not verb.objects
        for kind in verb.subjects
    )
    assert sum(2 ** tasks.surprisal(m) for m in bare) / len(drawn) == pytest.approx(expected, rel=0.1)


def test_questions_have_the_right_option_first() -> None:
    with comparison.base_folder() as folder:
        items = tasks.held_out(AutoTokenizer.from_pretrained(folder), 50, 1)
    for (context, options), source, reference in zip(items.questions, items.sources, items.references, strict=True):
        assert (context, options[0]) == (f"{reference} =", f" {source}")
        assert len(set(options)) == tasks.OPTIONS


def test_documents_say_the_same_on_both_sides() -> None:
    meanings = {}
    stream = tasks.meanings("train", 5)
    for _ in range(3000):
        meaning = next(stream)
        meanings[language.base_sentence(meaning)] = language.invented_sentence(meaning, language.TAVOSI)
    directions = {"into": 0, "out of": 0, "alone": 0}
    for document in tasks.training_documents(3000, 5):
        left, _, right = document.text.partition(" = ")
        if not right:
            assert left in meanings.values()
            directions["alone"] += 1
        elif left in meanings:
            assert meanings[left] == right
            directions["out of"] += 1
        else:
            assert meanings[right] == left
            directions["into"] += 1
    for name, share in zip(("alone", "into", "out of"), tasks.SHARES, strict=True):
        assert directions[name] / 3000 == pytest.approx(share, abs=0.05)
