"""The documents say what the project does: their links lead somewhere, their options exist, their examples run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import cogsym
from cogsym.cli import app

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
COMMANDS = typer.main.get_command(app).commands
# Of pytest, setuptools and mkdocs, which the documents name too.
OTHERS = set(
    "--build-lib --build-temp --folder --fuzz-examples --help --huge --inplace --machine_rank --main_process_ip "
    "--main_process_port --maxprocesses --minutes --multi_gpu --nnodes --no-deps --no-python --nproc-per-node "
    "--num_machines --num_processes --part --rdzv-backend --rdzv-endpoint --seconds --shuffle --strict --tiny "
    "--wheel-dir".split()
)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def fences(page: Path, language: str) -> list[tuple[str, str]]:
    """(title or "", text) of each fenced example."""
    return re.findall(rf'```{language}(?: title="([^"]+)")?\n(.*?)```', page.read_text("utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", page.read_text("utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not heading or heading in anchors(path), f"{target}#{heading}"


@pages
def test_options_exist(page: Path) -> None:
    known = {
        name
        for command in COMMANDS.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text("utf-8"))
    assert set(named) <= known | OTHERS


@pages
def test_commands_are_understood(page: Path) -> None:
    for _, text in fences(page, "bash"):
        for command in re.findall(r"^cogsym .*?(?<!\\)$", text, flags=re.M | re.S):
            name, *arguments = shlex.split(command.replace("\\\n", " "))[1:]
            context = COMMANDS[name].make_context(name, arguments)  # raises where an option is unknown
            assert context.command is COMMANDS[name] and not context.args


def test_examples_run(tmp_path: Path) -> None:
    """A page's in one process, in their order, as its reader would type them."""
    page = ROOT / "docs" / "extending.md"
    elsewhere = {"training", "sweeps", "own-trainer"}  # tests/test_readme.py and tests/test_examples.py run those
    assert {p.stem for p in DOCS if fences(p, "python")} == {page.stem, *elsewhere}
    script = ""
    for title, text in fences(page, "python"):
        if title:
            (tmp_path / title).parent.mkdir(exist_ok=True)
            (tmp_path / title).write_text(text, "utf-8")
        else:
            script += text
    (tmp_path / "examples.py").write_text(script, "utf-8")
    path = os.pathsep.join(filter(None, [str(Path(cogsym.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "examples.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_errors_are_those_of_the_code() -> None:
    """Each message that the page explains is a part of one in the sources."""
    messages = []
    for file in (ROOT / "cogsym").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                messages.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "errors.md").read_text("utf-8"), flags=re.M)
    assert len(rows) > 40
    for row in rows:
        text = row.strip("… ")
        assert any(text in message for message in messages), row


def test_every_variable_is_explained() -> None:
    page = (ROOT / "docs" / "environment.md").read_text("utf-8")
    sources = [*(ROOT / "cogsym").rglob("*.py"), ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    read = re.compile(r"environ(?:\.get\(|\[|\.setdefault\()\"([A-Z_]+)\"")
    found = {name for path in sources for name in read.findall(path.read_text("utf-8"))} - {"PYTHONPATH"}
    assert found and not {name for name in found if f"`{name}" not in page}


def test_the_public_names_are_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    listed = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", page, flags=re.M)}
    assert set(cogsym.__all__) <= listed
