"""The README and the pages on training and sweeps: tables are the committed results, commands and code run."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cogsym.bench import report
from cogsym.bench.machine import machine_class

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def tables() -> Any:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_the_committed_results() -> None:
    pages = [path.read_text("utf-8") for path in tables().PAGES]
    named = [name for page in pages for name in re.findall(r"<!-- table: (\w+) -->", page)]
    assert sorted(named) == sorted(tables().TABLES)
    for page in pages:
        assert tables().rendered(page) == page


def test_results_name_machine_versions_and_command() -> None:
    paths = list((ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        result = report.read(path)
        assert result["command"] and result["machine"]["processor"] and result["machine"]["torch"]
        assert path.parent.name == machine_class(result["machine"])


def test_each_machine_has_its_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tables()
    mine = report.read(module.RESULTS / "xeon-amx" / "train_speed.json")
    other = mine | {"date": "2026-01-02", "machine": mine["machine"] | {"processor": "AMD EPYC 7763 (avx2)"}}
    for result in (mine, other):
        folder = tmp_path / machine_class(result["machine"])
        folder.mkdir()
        report.write(result, folder / "train_speed.json")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    first, second = module.each_machine("train_speed", module.chosen).split("\n\nxeon-amx: ")
    assert first.startswith("epyc-avx2: 2 cores of AMD EPYC 7763, 2026-01-02\n\n| ") and "| 709 |" in first
    assert second.startswith("2 cores of Intel(R) Xeon(R) Processor\n\n| ") and "| 709 |" in second


@pytest.mark.parametrize(
    ("processor", "gpu", "expected"),
    [
        ("Intel(R) Xeon(R) Processor (avx2, avx512, avx512_bf16, amx_bf16, amx_int8)", "none", "xeon-amx"),
        ("Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz (avx2, avx512)", "none", "xeon-avx512"),
        ("AMD EPYC 9V74 80-Core Processor (avx2, avx512, avx512_bf16)", "none", "epyc-avx512bf16"),
        ("AMD EPYC 7763 64-Core Processor (avx2)", "none", "epyc-avx2"),
        ("AMD Ryzen 7 5800U with Radeon Graphics", "none", "ryzen-plain"),
        ("Neoverse-V1 (neon, bf16)", "none", "neoverse-bf16"),
        ("aarch64 (neon)", "none", "processor-neon"),
        ("Intel(R) Xeon(R) (avx2)", "NVIDIA H100 80GB HBM3, CUDA 12.8", "h100"),
    ],
)
def test_classes_of_machines(processor: str, gpu: str, expected: str) -> None:
    assert machine_class({"processor": processor, "gpu": gpu}) == expected


def test_links_lead_somewhere() -> None:
    for page in tables().PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "command", re.findall(r"^cogsym (?:train|sweep|plot|demo|bench|info).*?(?<!\\)$", README, flags=re.M | re.S)
)
def test_the_commands_of_the_readme_are_understood(command: str) -> None:
    import typer

    from cogsym.cli import app

    name, *arguments = shlex.split(command.replace("\\\n", " "))[1:]
    # Raises where an option is unknown.
    context = typer.main.get_command(app).commands[name].make_context(name, arguments)
    assert context.command.name == name


def test_the_python_examples_run(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [(ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("training", "sweeps")]
    found = re.findall(r"```python\n(.*?)```", "".join(pages), flags=re.S)
    prepare, sweep = [code for code in found if "lm_eval" not in code]  # whose tasks come from the network
    names: dict[str, Any] = {}
    exec(prepare.replace("HuggingFaceTB/SmolLM2-135M", str(model_folder)), names)
    assert names["model"] is not None
    monkeypatch.chdir(tmp_path)
    Path("dev.jsonl").write_text(text_file.read_text("utf-8").replace('"sw"', '"swahili"'), "utf-8")
    exec(sweep.replace("smollm2-sw/model", str(model_folder)), names)
    assert set(names["table"]["metric"]) == {"bits_per_byte"}
    assert names["table"]["configuration"].nunique() == 11
