"""What is measured in a process of its own: an import, a first step, memory that nobody has used before."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from cogsym.errors import CogsymError


def run(command: list[str], **extra: Any) -> str:
    """Run a command outside the source tree; what it wrote to its standard output.

    Args:
        command: the program and its arguments.
        extra: for `subprocess.run`.

    Raises:
        CogsymError: it failed; the message is the last line that it wrote to its standard error.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), **extra)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CogsymError(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout


def run_python(code: str, **names: Any) -> str:
    """Run `code` in a new Python; what it printed.

    Args:
        code: what it runs; `json` is imported.
        names: what the code finds under these names, as JSON can hold it.

    Raises:
        CogsymError: it failed.
    """
    assignments = "".join(f"{name} = json.loads({json.dumps(value)!r})\n" for name, value in names.items())
    return run([sys.executable, "-c", f"import json\n{assignments}{code}"])
