"""The house: an import goes down, never up, and never sideways between training and sweeps."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import from its own floor and from those below. The longest matching name counts.
FLOORS = {
    "cogsym": 8,  # __init__.py: the functions people call
    "cogsym.bench": 9,
    "cogsym.cli": 9,
    "cogsym.commands": 9,
    "cogsym.demo": 9,
    "cogsym.info": 9,
    "cogsym.training": 4,
    "cogsym.sweeps": 8,  # the run on top of the rooms, whose order follows
    "cogsym.sweeps.results": 7,
    "cogsym.sweeps.tasks": 6,
    "cogsym.sweeps.engine": 5,
    "cogsym.sweeps.layers": 4,
    "cogsym.models": 3,
    "cogsym.ops": 2,
    "cogsym.kernels": 1,
    "cogsym._C": 1,
    "cogsym.data": 1,
    "cogsym.decoder": 1,
    "cogsym.plan": 1,
    "cogsym.errors": 0,
    "cogsym.heartbeat": 1,
    "cogsym.memory": 1,
    "cogsym.plotting": 1,
    "cogsym.ranks": 1,
    "cogsym.records": 1,
    "cogsym.registry": 1,
    "cogsym.signals": 1,
    "cogsym.strategies": 1,
    "cogsym.user_files": 1,
}
APART = {"cogsym.training", "cogsym.sweeps"}


def place(module: str) -> str:
    """The part of the house that a module is in."""
    return max((name for name in FLOORS if module == name or module.startswith(f"{name}.")), key=len)


def violations(module: str, source: str) -> list[str]:
    """The imports of `module` that go up, or across the hall."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        here = place(module)
        for target in targets:
            if target.split(".")[0] != "cogsym":
                continue
            there = place(target)
            if there == "cogsym" and module != "cogsym" and FLOORS[here] <= FLOORS[there]:
                wrong.append(f"{module} imports {target} from the package's front door")
            elif FLOORS[there] > FLOORS[here] or {".".join(name.split(".")[:2]) for name in (here, there)} == APART:
                wrong.append(f"{module} imports {target}")
    return wrong


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in ((ROOT / "cogsym", "cogsym"), (ROOT / "kernels", "cogsym.kernels")):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == "cogsym" and "kernels" in path.parts[len(ROOT.parts) :]:
                continue  # a link to the other folder
            name = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            found.append((name.removesuffix(".__init__"), path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down(module: str, path: Path) -> None:
    assert violations(module, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cogsym.ops.rms_norm", "from cogsym.models import Block"),
        ("cogsym.models.block", "import cogsym.training.prepare"),
        ("cogsym.kernels.rotary", "def f():\n    from cogsym.ops import backend"),
        ("cogsym.training.finetune", "from cogsym.sweeps.engine import forward as engine"),
        ("cogsym.sweeps.runner", "from cogsym.training import prepare"),
        ("cogsym.sweeps.engine.score", "import cogsym.training.keep"),
        ("cogsym.training.finetune", "from cogsym.sweeps.layers import trie"),
        ("cogsym.sweeps.layers.trie", "from cogsym.sweeps.engine.requests import Score"),
        ("cogsym.sweeps.engine.score", "from cogsym.sweeps.tasks.metrics import METRICS"),
        ("cogsym.sweeps.tasks.task", "from cogsym.sweeps.results import store"),
        ("cogsym.sweeps.results.store", "from cogsym.sweeps.runner import sweep"),
        ("cogsym.training.finetune", "from cogsym.cli import app"),
        ("cogsym.training.finetune", "from cogsym import prepare"),
    ],
)
def test_an_arrow_that_goes_up_is_seen(module: str, source: str) -> None:
    assert violations(module, source)


def test_every_module_is_on_a_floor() -> None:
    assert len(modules()) > 20
    assert {place(name) for name, _ in modules()} <= set(FLOORS)
    front = {name for name, _ in modules() if place(name) == "cogsym"}
    assert front == {"cogsym"}, "a new module at the top of the package needs a floor"
