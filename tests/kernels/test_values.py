"""Runs the tests of `interpreted/` in a process of their own, with Triton's interpreter switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_in_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    environment = {name: value for name, value in os.environ.items() if name != "COGSYM_BACKEND"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(folder)]
    child = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, cwd=folder.parents[2], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
