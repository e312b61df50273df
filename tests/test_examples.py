"""The examples run, and lose what the same model frozen without cogsym loses, step by step; on two processes too."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cogsym.models import Block

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "compare"))
NEEDS = {"trl": ("trl",), "quantised": ("bitsandbytes", "torchao")}  # packages of which one is enough
LIMIT = 240  # seconds


def imported(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setitem(sys.modules, "trackio", None)  # which TRL imports, whole or not; no example reports to it
        return importlib.import_module(name)


@pytest.fixture
def steady(model_folder: Path) -> Path:
    """The tiny model without dropout."""
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return model_folder


@pytest.mark.parametrize("name", NAMES)
def test_an_example_loses_what_the_model_loses_unprepared(
    name: str, steady: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = NEEDS.get(name.split("_")[0], ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        pytest.skip(f"{' or '.join(packages)} is not installed")
    blocks = []
    for way in ("forward", "run"):  # trained and frozen layers
        own = getattr(Block, way)
        monkeypatch.setattr(Block, way, lambda *a, own=own, **k: (blocks.append(1), own(*a, **k))[1])
    losses, compare = imported(name).losses, imported("compare")
    ours = losses(steady)
    assert blocks
    blocks.clear()
    theirs = losses(steady, compare.frozen)
    assert not blocks and ours.keys() == theirs.keys()
    for what, values in theirs.items():
        assert len(values) == len(ours[what]) and all(map(math.isfinite, values))
        assert ours[what] == pytest.approx(values, rel=1e-3, abs=1e-5), what
    longest = max(ours.values(), key=len)
    assert len({round(loss, 6) for loss in longest}) == len(longest)  # it learns


def test_examples_are_short_and_all_are_compared() -> None:
    assert set(imported("compare").EXAMPLES) == set(NAMES)
    assert all(len((FOLDER / f"{name}.py").read_text().splitlines()) < 60 for name in NAMES)


def test_the_page_on_other_trainers_shows_lines_of_the_examples() -> None:
    page = (ROOT / "docs" / "own-trainer.md").read_text("utf-8")
    lines = {line.strip() for path in FOLDER.glob("*.py") for line in path.read_text("utf-8").splitlines()}
    shown = [line for code in page.split("```python\n")[1:] for line in code.split("```")[0].splitlines()]
    assert shown and all(line.strip() in lines for line in shown if line.strip())
    assert all(f"examples/{name}.py" in page and f"| {name} |" in page for name in NAMES)


def test_two_processes_lose_what_one_does(steady: Path, tmp_path: Path) -> None:
    """As accelerate wraps the model, by DDP and by FSDP2."""
    one = imported("accelerate_loop").losses(steady)["training"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, str(steady), str(tmp_path / "told")]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told").read_text())
    assert set(told) == {"DistributedDataParallel", "FSDPLlamaForCausalLM"}
    assert all(losses == pytest.approx(one, rel=1e-4) for losses in told.values())


def worker(folder: Path, told: Path) -> None:
    """What each of two processes does; accelerate shards on GPUs alone, and is told that this is one."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    losses, results = imported("accelerate_loop").losses, {}
    for sharded in (False, True):
        accelerator: Any = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        if sharded:
            state: Any = AcceleratorState()
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
            )
        wrapped, prepare = [], accelerator.prepare
        accelerator.prepare = lambda *parts, prepare=prepare, to=wrapped: (to.extend(prepare(*parts)), to)[1]
        found = losses(folder, accelerator=accelerator)["training"]
        results[type(wrapped[0]).__name__] = found
    if accelerator.is_main_process:
        told.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
