"""What the guard measures: numbers that do not depend on a clock.

    python tests/guard/measures.py

measures them here and writes `expected.json` anew, on purpose, when a change is meant; the diff shows what it cost.
Counts of instructions and of Triton's resources belong to a compiler, and are kept for each compiler apart.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recorder
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
ISA = "avx2"  # valgrind runs nothing above it
ROWS, LAYERS = 120, 6
# What a count may rise before it is red; Python's own instructions around a call vary a little.
TOLERANCE = {"steps": 0.0, "sweeps": 0.0, "instructions": 0.02, "triton": 0.0, "device": 0.0}
CHIPS = ("sm_90", "gfx942")
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")

Counts = dict[str, float]


class Launches(TorchDispatchMode):
    """Counts calls of cogsym's operations, of matrix products, and of all other operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rpartition(".")[0]
        if name in PRODUCTS:
            self.counts["products"] += 1
        elif name.startswith("cogsym."):
            self.counts[name] += 1
        elif not function.is_view:
            self.counts["others"] += 1
        return function(*args, **(kwargs or {}))


def _model() -> Any:
    """A small Llama of random weights."""
    from transformers import LlamaForCausalLM

    from cogsym.bench.models import Shape

    torch.manual_seed(0)
    return LlamaForCausalLM(Shape("guarded", "Llama", 96, 256, LAYERS, 6, 2, 16, 512, True).config())


def steps() -> Counts:
    """FLOPs, saved bytes and launches of a training step, for each choice of what frozen layers keep."""
    import cogsym
    from cogsym.bench.method import saved_bytes

    model = _model().train()
    ids = torch.randint(model.config.vocab_size, (2, 64))
    found: Counts = {}
    for keep in ("all", "attention", "input", "nothing"):
        cogsym.prepare(model, cogsym.LayerPlan.outer(LAYERS, front=1, back=1), keep=keep)

        def forward() -> torch.Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        left_out = [*model.parameters(), *model.buffers()]
        found[f"{keep}: saved bytes"] = saved_bytes(forward, left_out)
        with FlopCounterMode(display=False) as flops:
            forward().backward()
        found[f"{keep}: FLOPs"] = flops.get_total_flops()
        with Launches() as launches:
            forward().backward()
        found |= {f"{keep}: {name}": count for name, count in sorted(launches.counts.items())}
        found[f"{keep}: launches"] = sum(launches.counts.values())
    return found


def sweeps() -> Counts:
    """Layer-forwards, FLOPs and launches of sweeps that score, for each set of configurations; and of one that writes,
    whose products go to another library under a name without a count of FLOPs."""
    from cogsym.sweeps.engine.forward import Engine
    from cogsym.sweeps.engine.generate import generate
    from cogsym.sweeps.engine.requests import Generate, Score
    from cogsym.sweeps.engine.sampling import Stops
    from cogsym.sweeps.engine.score import score
    from cogsym.sweeps.engine.unembedding import SweepHead
    from cogsym.sweeps.engine.weights import ResidentLayers
    from cogsym.sweeps.layers.configurations import GENERATORS, configurations, distinct
    from cogsym.sweeps.layers.trie import Trie

    model = _model().eval()
    layers, head = ResidentLayers(model), SweepHead(model)
    engine, told = Engine(layers), [0.0]
    engine.on_forwards = told.append
    asked = [Score(tuple(range(2, 20)), 12), Score((*range(2, 14), *range(30, 40)), 12), Score(tuple(range(9)), 1)]
    prompts = [Generate(tuple(range(first, first + 8)), 4) for first in (0, 100)]

    class Words:
        """Two texts never differ, so that all rows write to their end."""

        def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
            return ""

    def counted(what: str, run: Callable[[Trie], object]) -> Counts:
        trie = Trie(distinct(configurations(what.partition(":")[0], LAYERS))[0])
        told.clear()
        with FlopCounterMode(display=False) as flops, Launches() as launches:
            run(trie)
        return {
            f"{what}: layer-forwards": sum(told),
            f"{what}: FLOPs": flops.get_total_flops(),
            f"{what}: launches": sum(launches.counts.values()),
        }

    found: Counts = {}
    for what in GENERATORS:
        found |= counted(what, lambda trie: score(engine, head, trie, asked))
    writing = counted("input,output: writing", lambda trie: generate(engine, head, trie, prompts, Stops(Words(), [])))
    layers.close()
    return found | {name: count for name, count in writing.items() if not name.endswith("FLOPs")}


def instructions(rows: int = ROWS) -> Counts:
    """Of each call of a C++ kernel that the operations' examples make, by callgrind."""
    from cogsym import _C

    before, threads = _C.isa(), torch.get_num_threads()
    _C.set_isa(ISA)
    torch.set_num_threads(1)
    calls = recorder.record(rows)
    _C.set_isa(before)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder, "calls")
        recorded.write_bytes(pickle.dumps([tuple(call) for call in calls]))
        command = [
            "valgrind", "--tool=callgrind",
            "--dump-after=pybind11::cpp_function::dispatcher*", "--dump-after=*call_kernel*",
            f"--callgrind-out-file={folder}/out",
            sys.executable, "-S", str(HERE / "callgrind.py"), extension(), ISA, str(recorded),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONHASHSEED": "0"})
        if done.returncode:
            raise RuntimeError(f"callgrind ended with status {done.returncode}: {done.stderr[-2000:]}")
        found = {}
        for i, call in enumerate(done.stdout.splitlines()):
            totals = re.search(r"^totals: (\d+)", Path(f"{folder}/out.{2 * i + 3}").read_text(), re.M)
            assert totals
            found[call] = int(totals[1])
    return found


def why_no_instructions() -> str | None:
    """Why they cannot be counted here, or None."""
    if not extension():
        return "the C++ extension is not built"
    if not shutil.which("valgrind"):
        return "valgrind is not installed"
    from cogsym import _C

    return None if ISA in _C.isas() else f"the extension has no {ISA} kernels here"


def triton_resources() -> Counts:
    """Registers, spilled bytes and shared bytes of every kernel, in bfloat16, for a chip of each maker."""
    aot = _aot()
    found: Counts = {}
    for case in aot.CASES:
        for target in CHIPS:
            for i, launch in enumerate(aot.launches(case, torch.bfloat16, target)):
                r = aot.resources(aot.compile_for(aot.TARGETS[target], launch))
                name = f"{case[0]} {case[1]}, launch {i}, {launch.kernel.__name__}, {target}"
                found |= {f"{name}: {what}": value for what, value in vars(r).items()}
    return found


def why_no_triton() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from cogsym.kernels.common import INTERPRETED

    return "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled" if INTERPRETED else None


def device() -> Counts:
    """Launches, waits and forbidden tensors of steps and sweeps on a CUDA device that computes nothing."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COGSYM_BACKEND", "LD_PRELOAD")}
    command = [sys.executable, "-W", "ignore", str(HERE.parent / "fakecuda" / "traces.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the traces ended with status {done.returncode}: {done.stderr[-2000:]}")
    found: Counts = json.loads(done.stdout.splitlines()[-1])
    return found


def libraries() -> str:
    """What launches besides our kernels."""
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def why_no_device() -> str | None:
    """Why there can be no such device here, or None."""
    if reason := why_no_triton():
        return reason
    if torch.version.cuda or torch.version.hip:
        return "this PyTorch has a GPU's own device, beside which there can be no other"
    return None if sys.platform == "linux" and shutil.which("g++") else "there is no g++ to compile its guard with"


@functools.cache
def _aot() -> Any:
    spec = importlib.util.spec_from_file_location("guarded_aot", HERE.parent / "kernels" / "aot.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def extension() -> str:
    """The path of the C++ extension, or the empty string."""
    from cogsym.ops import backend

    if backend.unavailable("cpp"):
        return ""
    from cogsym import _C

    return str(_C.__file__)  # type: ignore[attr-defined]


def compiler() -> str:
    """What compiled the extension, as its binary says."""
    found = re.search(rb"(GCC: \(.*?\) [\d.]+|clang version [\d.]+)", Path(extension()).read_bytes())
    return found[1].decode() if found else "unknown"


def triton_version() -> str:
    """What compiles the Triton kernels."""
    import triton

    return f"Triton {triton.__version__}"


# kind -> (what measures it, what it belongs to, why it cannot be measured here)
KINDS: dict[str, tuple[Callable[[], Counts], Callable[[], str], Callable[[], str | None]]] = {
    "steps": (steps, lambda: "any", lambda: None),
    "sweeps": (sweeps, lambda: "any", lambda: None),
    "instructions": (instructions, compiler, why_no_instructions),
    "triton": (triton_resources, triton_version, why_no_triton),
    "device": (device, libraries, why_no_device),
}


def expected(kind: str) -> Counts | None:
    """The committed table for what is here; None where there is none for this compiler."""
    table: Counts | None = json.loads(EXPECTED.read_text("utf-8"))[kind].get(KINDS[kind][1]())
    return table


def changes(kind: str, got: Counts, want: Counts) -> list[str]:
    """What is not as committed; less than expected is a change too, to be written down."""
    lines = [f"{name}: {got.get(name)} instead of {want.get(name)}" for name in sorted(got.keys() ^ want.keys())]
    for name in sorted(got.keys() & want.keys()):
        if abs(got[name] - want[name]) > TOLERANCE[kind] * want[name]:
            lines.append(f"{name}: {got[name]:,} instead of {want[name]:,}")
    return lines


def main() -> None:
    """Write the table anew for what is here, and say what changed."""
    table = json.loads(EXPECTED.read_text("utf-8")) if EXPECTED.exists() else {}
    for kind, (measure, owner, why_not) in KINDS.items():
        if reason := why_not():
            print(f"{kind}: left as it is, {reason}")
            continue
        got = measure()
        before = table.setdefault(kind, {}).get(owner())
        lines = changes(kind, got, before) if before else [f"{len(got)} numbers, new"]
        print(*(f"{kind}: {line}" for line in lines or ["as committed"]), sep="\n")
        # What is within the tolerance stays as it was, so that the diff shows what was meant.
        same = {n: v for n, v in (before or {}).items() if n in got and not changes(kind, {n: got[n]}, {n: v})}
        table[kind][owner()] = got | same
    EXPECTED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
