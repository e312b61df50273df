"""The README says what the project does: its tables are the committed results, its commands and code run."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

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
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = tables().load(path.stem)
        assert result["command"] and result["machine"]["processor"] and result["machine"]["torch"]


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
    prepare, sweep = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict[str, Any] = {}
    exec(prepare.replace("HuggingFaceTB/SmolLM2-135M", str(model_folder)), names)
    assert names["model"] is not None
    monkeypatch.chdir(tmp_path)
    Path("dev.jsonl").write_text(text_file.read_text("utf-8").replace('"sw"', '"swahili"'), "utf-8")
    exec(sweep.replace("smollm2-sw/model", str(model_folder)), names)
    assert set(names["table"]["metric"]) == {"bits_per_byte"}
    assert names["table"]["configuration"].nunique() == 11
