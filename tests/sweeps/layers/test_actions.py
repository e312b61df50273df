"""The table of actions: what may be added to it, and that nothing else knows what is in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cogsym
from cogsym.errors import CogsymError
from cogsym.sweeps.layers.actions import ACTIONS, KEEP, SKIP, Action, register_action


def test_the_table() -> None:
    assert {name: (a.letter, a.attention, a.mlp) for name in ACTIONS for a in [ACTIONS[name]]} == {
        "keep": (".", "model", "model"),
        "skip": ("s", None, None),
        "skip_attention": ("a", None, "model"),
        "skip_mlp": ("m", "model", None),
        "revert": ("r", "base", "base"),
    }
    assert [name for name in ACTIONS if ACTIONS[name].needs_base] == ["revert"]
    assert [name for name in ACTIONS if not ACTIONS[name].whole] == ["skip_attention", "skip_mlp"]


@pytest.mark.parametrize(
    ("name", "letter", "message"),
    [
        ("skip", "x", "The action 'skip' is registered already; choose another name for the new one."),
        ("other", "s", "The action other has the letter 's' of skip; give it another one."),
        ("other", "", "has the letter '', expected one character that can be seen."),
        ("other", "xy", "has the letter 'xy', expected one character"),
        ("other", " ", "has the letter ' ', expected one character"),
    ],
)
def test_names_and_letters_are_given_once(name: str, letter: str, message: str) -> None:
    with pytest.raises(CogsymError) as caught:
        register_action(name, Action(letter, "model", None, "without"))
    assert message in str(caught.value) and "other" not in ACTIONS


def test_nothing_else_knows_the_list() -> None:
    """Beside the two that mean \"nothing\" and \"unless told\", no action is named in code outside the table."""
    root = Path(cogsym.__file__).parent
    for path in [root / "cli.py", root / "__init__.py", *(root / "sweeps").rglob("*.py")]:
        tree = ast.parse(path.read_text("utf-8"))
        if path.name == "actions.py":
            continue
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & set(ACTIONS)
        assert named <= ({SKIP} if path.name == "cli.py" else set()), path
    assert KEEP in ACTIONS
