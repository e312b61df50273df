"""Every study of benchmarks/ runs to its end at a tiny size, and its committed results make its table."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from texts import sentences
from torch import nn

import cogsym
from cogsym.bench import ops, report, study
from cogsym.bench.case import OURS, Case, Line, measure
from cogsym.bench.models import build
from cogsym.decoder import layers_of
from cogsym.models.loading import load_model
from cogsym.models.projections import SCALE
from cogsym.ops import operations
from cogsym.training.streamed import on_disk

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NO_STUDIES = {"bench", "conftest", "gpu", "readme"}
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in NO_STUDIES)
OF_TINY_SHAPE = (
    "attention", "decode_attention", "frozen", "linear", "linear_cross_entropy", "longest", "parts", "stored",
    "streamed", "streamed_train",
)  # fmt: skip
OF_A_FOLDER = ("harness", "int8", "swahili", "swahili_sweep", "train_speed")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Line]]:
    """A script's quick run, one round a case; the cases of its result file."""
    monkeypatch.setattr(study, "measure", lambda case, device, *_: measure(case, device, 1))

    def call(name: str, *words: object) -> list[Line]:
        module = script(name)
        study.main(module.STUDY, module.__doc__, words=["--quick", "--out", str(tmp_path / "out"), *map(str, words)])
        result = report.read(tmp_path / "out" / f"{name}.json")
        assert result["command"].startswith(f"python benchmarks/{name}.py --quick --model ")
        assert not [line["different"] for line in result["cases"] if line["different"]]
        lines: list[Line] = result["cases"]
        return lines

    return call


@pytest.fixture
def texts(text_file: Path, tmp_path: Path) -> Path:
    """The folder of texts that the studies of training and of sweeps read, of made-up sentences."""
    folder, lines = tmp_path / "texts", sentences(12, seed=3)
    rows = {
        "ntrex-128/swa.jsonl": [{"text": line} for line in lines],
        "ntrex-128/eng.jsonl": [{"text": line} for line in lines],
        "xcopa/sw.test.jsonl": [
            {"premise": line, "question": kind, "choice1": line[::-1], "choice2": line, "label": 1}
            for line, kind in zip(lines, ("cause", "effect") * 6, strict=True)
        ],
    }
    for name, content in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    (folder / "globalvoices-en-sw").mkdir()
    for part in ("train", "dev", "test"):
        shutil.copy(text_file, folder / "globalvoices-en-sw" / f"{part}.jsonl")
    return folder


def test_every_script_is_tried_here() -> None:
    assert sorted({*OF_TINY_SHAPE, *OF_A_FOLDER, "noise", "waiting"}) == SCRIPTS


@pytest.mark.parametrize("name", OF_TINY_SHAPE)
def test_a_study_of_shapes_runs(name: str, run: Callable[..., list[Line]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes long
    lines = run(name, "--model", "tiny")
    assert lines and {line["part"] for line in lines} == {name}
    for line in lines:
        if line["variants"]:
            assert OURS in line["variants"] and (len(line["variants"]) > 1 or name == "parts")
            assert not line["skipped"] or name == "stored"  # as a quick run of bench sweep
    if name == "streamed":
        for result in lines[0]["variants"].values():
            assert 0 < result["seconds"] < result["seconds_in_all"] and result["peak_bytes"] > 10**8
    if name == "parts":
        found = lines[0]["variants"][OURS]
        assert all(found[part] > 0 for part in ("products", "attention", "activation", "norms", "rotary", "rest"))
        assert found["products"] + found["attention"] < found["seconds"]
    if name == "frozen":
        kept = {label: v["kept_bytes_a_token"] for label, v in lines[0]["variants"].items()}
        assert kept["cogsym, keeps nothing"] < kept["cogsym, keeps input"] < kept[OURS] < kept["transformers, frozen"]


def test_training_is_timed_by_itself_and_compared(
    run: Callable[..., list[Line]], model_folder: Path, texts: Path
) -> None:
    config = json.loads((model_folder / "config.json").read_text("utf-8"))
    # Of two loops only what is drawn by chance differs.
    (model_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}), "utf-8")
    (line,) = run("train_speed", "--model", model_folder, "--data", texts)
    assert line["facts"]["largest_difference_of_float32_losses"] < 1e-4
    assert all(0 < v["seconds"] < 60 for v in line["variants"].values()) and len(line["variants"]) == 2


def test_methods_of_training_are_scored(
    run: Callable[..., list[Line]], model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    options = ("--model", model_folder, "--data", texts, "--work", tmp_path / "work")
    (alone,) = run("swahili", *options, "--case", "lora")
    before, outer, whole, lora = run("swahili", *options, "--resume")
    assert lora == alone and lora["facts"]["trained_parameters"] < outer["facts"]["trained_parameters"]
    assert outer["facts"]["trained_parameters"] < whole["facts"]["trained_parameters"]
    assert before["facts"]["xcopa_sw"]["questions"] == 12 and outer["facts"]["tried"].keys() == {"0.0003"}


def test_weights_in_int8_are_set_beside_bfloat16(
    run: Callable[..., list[Line]], model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    lines = run("int8", "--model", model_folder, "--data", texts, "--work", tmp_path / "work")
    *products, step, before, bfloat16, int8 = lines
    for line in products:
        errors = {label: result["error"] for label, result in line["variants"].items()}
        assert 0.003 < errors.pop(OURS) < 0.03 and max(errors.values()) < 0.01
    held = {label: result["weight_bytes"] for label, result in step["variants"].items()}
    assert held.pop(OURS) < 0.6 * min(held.values())
    scores = [line["facts"]["bits_per_byte"] for line in (before, bfloat16, int8)]
    assert len({*scores}) == 3


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_bytes_that_fit_are_those_of_models(adapters: bool, tmp_path: Path) -> None:
    """Weights, gradients and the optimizer's state as the table of what fits has them, however frozen ones are held."""
    longest, plan = script("longest"), cogsym.LayerPlan.outer(4)
    build("tiny", None, torch.bfloat16, torch.device("cpu")).save_pretrained(tmp_path)
    per_layer = longest.adapter_parameters("tiny")
    line = {"name": "tiny", "facts": {"parameters": longest.parameters("tiny"), "adapters": per_layer}}
    for frozen in longest.HELD:
        streams = frozen == "on disk"
        model = cogsym.load_streamed(tmp_path, plan) if streams else load_model(tmp_path)
        if adapters:
            names = [name for name, module in model.model.layers[0].named_modules() if isinstance(module, nn.Linear)]
            names = [name.rpartition(".")[2] for name in names]
            config = LoraConfig(r=longest.LORA_RANK, target_modules=names, layers_to_transform=[*plan.trained])
            model = get_peft_model(model, config)
        cogsym.prepare(model, plan, frozen_weights="int8" if frozen == "int8" else None)
        held = [p for p in model.parameters() if not p.is_meta]
        taken = sum(p.numel() * 16 if p.requires_grad else p.nbytes for p in held)
        taken += sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(SCALE))
        blocks = [block.nbytes for layer in layers_of(model) if (block := on_disk(layer))]
        assert taken + sum(blocks[:2]) == longest.weight_bytes(line, plan, adapters, frozen), frozen
        assert bool(blocks) == streams


def test_the_harness_is_timed_over_a_sweep(run: Callable[..., list[Line]], model_folder: Path, texts: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[lm_eval]'")
    (line,) = run("harness", "--model", model_folder, "--data", texts)
    assert len(line["variants"]) == 2


def test_ways_of_waiting_are_set_beside_each_other(
    run: Callable[..., list[Line]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("waiting")
    monkeypatch.setattr(
        module, "SETTINGS", {label: module.SETTINGS[label] for label in ("one thread", "libgomp's own")}
    )
    monkeypatch.setattr(sys.modules[__name__], "script", lambda name: module)
    (line,) = run("waiting", "--model", "tiny")
    assert all(rate > 0 for loads in line["facts"]["rates"].values() for rates in loads.values() for rate in rates)


def test_a_sweep_is_noted(run: Callable[..., list[Line]], model_folder: Path, texts: Path, tmp_path: Path) -> None:
    (line,) = run("swahili_sweep", "--model", model_folder, "--data", texts, "--work", tmp_path / "work")
    assert line["facts"]["configurations"] == 11
    assert {value["metric"] for value in line["facts"]["values"]} >= {"accuracy", "bits_per_byte"}


def test_runs_are_compared(run: Callable[..., list[Line]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes are this one; a slower run is one whose own calls take longer."""
    slowed: list[Case] = []

    def in_this_process(code: str, *, folder: str, out: str, **names: Any) -> None:
        noise = script("noise")
        original = noise.slowed
        noise.slowed = lambda build: (slowed.append(original(build)), slowed[-1])[1]
        noise.quick_run(**names, out=Path(out))

    monkeypatch.setattr(ops, "PASSES", 1)
    one = {"rms_norm": ops.examples()["rms_norm"]}
    monkeypatch.setattr(ops, "examples", lambda: one)
    monkeypatch.setattr("cogsym.bench.process.run_python", in_this_process)
    lines = run("noise", "--model", "tiny")
    assert [line["name"].partition(":")[0] for line in lines] == ["runs"] * 4 + ["pairs"] * 6
    assert len(slowed) == 2
    for pair in lines[4:]:
        assert sum(pair["facts"]["verdicts"].values()) == len(pair["facts"]["changes"]) == 2


def test_only_the_cases_asked_for_are_measured_and_the_others_are_kept(
    run: Callable[..., list[Line]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (first,) = run("attention", "--model", "tiny", "--case", "bfloat16: 4 x 256 tokens, forward")
    names = [line["name"] for line in run("attention", "--model", "tiny", "--case", "float32", "--resume")]
    assert first["name"] in names and len(names) == 4 - 1
    assert "1/2 " in capsys.readouterr().out
    assert report.read(tmp_path / "out" / "attention.json")["command"].endswith(" --quick --model tiny --case float32")
    with pytest.raises(SystemExit):
        run("attention", "--model", "tiny", "--case", "nothing")
    assert capsys.readouterr().err.startswith("attention: --case is 'nothing', expected words of one of these cases: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_committed_results_make_the_table_on_a_narrow_screen(name: str, tmp_path: Path) -> None:
    committed = min((BENCHMARKS / "results").glob(f"*/{name}.json"))
    module, lines = script(name), report.read(committed)["cases"]
    for group in report.groups(lines).values():
        head, rows = module.STUDY.table(group)
        assert rows and {len(row) for row in rows} == {len(head)}
    text = StringIO()
    report.show(lines, module.STUDY.table, Console(file=text, width=80))
    assert max(map(len, text.getvalue().splitlines())) <= 80 and "…" not in text.getvalue()
    for draw in module.STUDY.pictures:
        draw(lines, tmp_path / f"{name}.json")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_every_operation_is_measured() -> None:
    by_themselves = {name for name, operation in operations().items() if operation.part_of is None}
    assert ops.examples().keys() == by_themselves - {"token_scores"}  # which is the loss without its mean


def test_the_scripts_measure_nothing_by_themselves() -> None:
    """Clocks, rounds, files and machines are the shared machinery's; a run that reports its own seconds has a clock."""
    allowed = {
        "train_speed": {"time.perf_counter"},  # of the steps of a run
        "streamed": {"time.perf_counter", "json.dumps"},  # in its process; the files of its model
        "streamed_train": {"time.perf_counter", "json.dumps"},  # in its process; what it reports
        "noise": {"time.perf_counter"},  # to be a tenth slower
        "parts": {"time.perf_counter"},  # of the parts of a step
        "waiting": {"time.perf_counter", "json.dumps"},  # in its processes; what they report
        "swahili": {"json.dumps"},  # what is noted of a training run
    }
    for name in SCRIPTS:
        source = (BENCHMARKS / f"{name}.py").read_text("utf-8")
        used = {word for word in ("time.perf_counter", "json.dumps", "statistics.quantiles") if word in source}
        assert used <= allowed.get(name, set()), name
        for word in ("machine.describe", "interleaved(", "first_calls(", "argparse", "savefig"):
            assert word not in source, f"{name} uses {word}"
