"""How long until it runs? A fresh install, the import, the first training step of a new process.

Only the import is timed in a quick run. The install needs a network, or a package index that is set up for pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from cogsym.bench import process, report
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.method import Variant
from cogsym.bench.study import Study
from cogsym.errors import CogsymError

ROOT = Path(__file__).resolve().parents[2]
IMPORT_SECONDS = 7.0  # of ours and of theirs, once each
MINUTES = 20  # that an install may take

_STEP = """
import torch
from cogsym.bench.train import make_job
from cogsym.bench.trainers import COMPETITORS
(competitor,) = [c for c in COMPETITORS if c.name == name]
job = make_job("SmolLM2-135M", 4, 1, 512, False, torch.device(device))
with competitor.applied(job) as loss:
    loss().backward()
"""


def cases(setting: Setting) -> list[CaseSpec]:
    """What there is to time."""
    rounds, passes = (5, 1) if setting.full else (1, 2)  # of which there may be time for one alone
    found = [CaseSpec("import", _import, rounds=rounds, passes=passes, seconds=IMPORT_SECONDS)]
    if setting.full:
        found.append(CaseSpec("first training step of a process", partial(_first_step, setting), rounds=3))
        found.append(CaseSpec("fresh install", _install, rounds=1))
    return found


def _process(code: str, **names: str) -> Variant:
    return Variant(partial(process.run_python, code, **names), warm_up=False)


def _import() -> Case:
    theirs = "import torch, transformers.modeling_utils"
    return Case({OURS: _process("from cogsym import prepare"), "transformers": _process(theirs)})


def _first_step(setting: Setting) -> Case:
    """Both start the same suite, and so import the same."""
    names = (OURS, "transformers, SDPA")
    return Case({name: _process(_STEP, name=name, device=setting.device.type) for name in names})


def _install() -> Case:
    """Into an empty virtual environment, once: the install is the measurement."""
    result = Case()
    if not (ROOT / "pyproject.toml").exists():
        result.skipped[OURS] = "there is no source tree to install from: cogsym is an installed package here"
        return result
    folder = Path(tempfile.mkdtemp())
    try:
        process.run([sys.executable, "-m", "venv", str(folder)], timeout=60 * MINUTES)
        empty, start = _size(folder), time.perf_counter()
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        process.run([*pip, str(ROOT)], timeout=60 * MINUTES)
        result.facts = {"install_seconds": time.perf_counter() - start, "installed_bytes": _size(folder) - empty}
    except (CogsymError, subprocess.TimeoutExpired) as error:
        result.skipped[OURS] = f"pip did not install it: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def table(lines: list[Line]) -> report.Table:
    """Each variant's time, and the fresh install's."""
    _, rows = report.by_variant(_cells)([line for line in lines if line["variants"]])
    for line in lines:
        if "install_seconds" in (facts := line["facts"]):
            size = f"with all it needs, {facts['installed_bytes'] / 1e6:,.0f} MB"
            rows.append([line["name"], size, f"{facts['install_seconds']:.0f}", ""])
    return ["", "", "seconds", "time / cogsym"], rows


def _cells(line: Line, result: dict[str, Any]) -> dict[str, str]:
    return {"seconds": f"{result['seconds']:.2f}", "ratio": report.spread(result.get("over_cogsym"))}


STUDY = Study("install", cases, table)
