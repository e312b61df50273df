"""How long until it runs? A fresh install, the import, the first training step of a new process.

Only the import is timed in a quick run. The install needs a network, or a package index that is set up for pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cogsym.bench.case import OURS, Case, Pending, Setting
from cogsym.bench.method import Variant
from cogsym.errors import CogsymError

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 20  # that an install may take

_STEP = """
import torch
from cogsym.bench.train import make_job
from cogsym.bench.trainers import COMPETITORS
(competitor,) = [c for c in COMPETITORS if c.name == {name!r}]
job = make_job("SmolLM2-135M", 4, 1, False, torch.device({device!r}))
with competitor.turn(job) as loss:
    loss().backward()
"""


def pending(setting: Setting) -> list[Pending]:
    """What there is to time."""
    found = [Pending("import", _import, rounds=5 if setting.full else 2)]
    if setting.full:
        found.append(Pending("first training step of a process", partial(_first_step, setting), rounds=3))
        found.append(Pending("fresh install", _install, rounds=1))
    return found


def _python(code: str) -> Callable[[], object]:
    """A new process that runs `code`, outside the source tree."""
    return lambda: _run([sys.executable, "-c", code])


def _run(command: list[str], **extra: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), **extra)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise CogsymError(said[-1] if said else f"exit status {done.returncode}")


def _import() -> Case:
    variants = {
        OURS: Variant(_python("from cogsym import prepare"), warm=False),
        "transformers": Variant(_python("import torch, transformers.modeling_utils"), warm=False),
    }
    return Case("install", "import", variants)


def _first_step(setting: Setting) -> Case:
    """Both start the same suite, and so import the same."""
    names = (OURS, "transformers, SDPA")
    steps = {name: _python(_STEP.format(name=name, device=setting.device.type)) for name in names}
    return Case(
        "install", "first training step of a process", {n: Variant(step, warm=False) for n, step in steps.items()}
    )


def _install() -> Case:
    """Into an empty virtual environment, once: the install is the measurement."""
    result = Case("install", "fresh install", {})
    if not (ROOT / "pyproject.toml").exists():
        result.skipped[OURS] = "there is no source tree to install from: cogsym is an installed package here"
        return result
    folder = Path(tempfile.mkdtemp())
    try:
        _run([sys.executable, "-m", "venv", str(folder)], timeout=60 * MINUTES)
        empty, start = _size(folder), time.perf_counter()
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        _run([*pip, str(ROOT)], timeout=60 * MINUTES)
        result.facts = {"install_seconds": time.perf_counter() - start, "installed_bytes": _size(folder) - empty}
    except (CogsymError, subprocess.TimeoutExpired) as error:
        result.skipped[OURS] = f"pip did not install it: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
