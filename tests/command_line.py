"""The command line in this process: a new one takes seconds to import torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cogsym import cli


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(name="cogsym")
def run_cogsym(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run a command."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["cogsym", *map(str, args)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        return Done(status, out, err)

    return run


@pytest.fixture(name="complaint")
def one_complaint(cogsym: Callable[..., Done]) -> Callable[..., str]:
    """The one line that a failed command prints; its status is 2 and it shows no traceback."""

    def run(*args: str | Path) -> str:
        done = cogsym(*args)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 2, done.stderr
        assert len(lines) == 1 and lines[0].startswith("cogsym: "), done.stderr
        return lines[0]

    return run
