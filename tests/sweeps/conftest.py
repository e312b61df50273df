"""A task of each kind, and sweeps of the tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from texts import sentences

import cogsym


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
