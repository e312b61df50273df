"""How long should OpenMP's threads spin before they sleep, on a machine that has other work to do?

    python benchmarks/waiting.py

Threads of libgomp wait for each other by spinning, GOMP_SPINCOUNT times, and sleep then. Where another process has one
of the cores, a thread that spins keeps off its core the one that it waits for. Each setting is a process of its own, as
it is read when the library is loaded; all of them take turns, with nothing beside them and beside one process that
keeps a core busy, which the system may share out as it likes.

Where other programs of a low priority run, as on a machine that is shared, they fill the gaps in which threads sleep:
the more a setting sleeps the slower it looks while it is "idle".
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from cogsym.bench import generate, train
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.models import build, shape_of
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main
from cogsym.bench.trainers import COMPETITORS
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import configurations, distinct

SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "libgomp's own": {},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (30_000, 10_000, 3_000, 1_000)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
LOADS = ("idle", "a busy core")
SECONDS, ROUNDS = 1.5, 5  # of a turn, and turns of each setting under each load
BUSY = "while True: pass"
WORKER = "import sys; sys.path.insert(0, sys.argv[1]); import waiting; waiting.serve(*sys.argv[2:])"


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = setting.models
    rounds = ROUNDS if setting.full else 1
    jobs = [("train", "tiny"), ("train", model), ("write", model)] if setting.full else [("train", "tiny")]
    return [
        CaseSpec(
            f"{shape_of(name).name}: {job}", partial(measured, job, name, rounds, SECONDS if setting.full else 0.5)
        )
        for job, name in jobs
    ]


def measured(job: str, model: str, rounds: int, seconds: float) -> Case:
    """Tokens a second of each setting under each load, of every round."""
    rates: dict[str, dict[str, list[float]]] = {label: {load: [] for load in LOADS} for label in SETTINGS}
    with ExitStack() as stack:
        workers = {label: stack.enter_context(worker(job, model, of)) for label, of in SETTINGS.items()}
        for _ in range(rounds):
            for load in LOADS:
                with busy() if load != "idle" else ExitStack():
                    for label, ask in workers.items():
                        rates[label][load].append(ask(seconds))
    return Case(facts={"rates": rates})


@contextmanager
def busy() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def worker(job: str, model: str, setting: dict[str, str]) -> Iterator[Callable[[float], float]]:
    """A process with a setting; called with seconds it works as long and returns tokens a second."""
    ours = {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | setting
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), job, model]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        process.stdout.readline()

        def ask(seconds: float) -> float:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            return float(json.loads(process.stdout.readline()))

        yield ask
    finally:
        process.kill()
        process.wait()


def serve(job: str, model: str) -> None:
    """What a worker does: work for as many seconds as each line says, and write tokens a second."""
    with {"train": training, "write": writing}[job](model) as (work, tokens):
        work()
        print("ready", flush=True)
        for line in sys.stdin:
            began, calls = time.perf_counter(), 0
            while (taken := time.perf_counter() - began) < float(line):
                work()
                calls += 1
            print(json.dumps(calls * tokens / taken), flush=True)


@contextmanager
def training(model: str) -> Iterator[tuple[Callable[[], object], int]]:
    """A step of 4 x 256 tokens, the outer quarter trained."""
    dtype = torch.float32 if model == "tiny" else torch.bfloat16
    job = train.make_job(model, shape_of(model).layers, 4, 256, False, torch.device("cpu"), dtype)
    optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad], 1e-6, fused=True)
    ours = next(c for c in COMPETITORS if c.name == OURS)
    with ours.applied(job) as loss:
        yield partial(train.take_step, optimizer, loss), job.inputs["input_ids"].numel()


@contextmanager
def writing(model: str) -> Iterator[tuple[Callable[[], object], int]]:
    """All configurations of the input and output directions go on from a prompt together."""
    net = build(model, None, torch.bfloat16, torch.device("cpu")).eval()
    chosen = [c for c in distinct(configurations("input,output", shape_of(model).layers))[0] if c.k < len(c.actions)]
    requests = generate.draw_prompts(1, generate.NEW_TOKENS[False], net)
    engine, head = Engine(ResidentLayers(net)), SweepHead(net)
    tokens = len(chosen) * generate.NEW_TOKENS[False]
    yield lambda: generate.write_tokens(engine, head, chosen, requests), tokens


def table(lines: list[Line]) -> Table:
    """Tokens a second, medians."""
    columns = [(line, load) for line in lines for load in LOADS]
    rows = [
        [label, *(f"{statistics.median(line['facts']['rates'][label][load]):,.0f}" for line, load in columns)]
        for label in SETTINGS
    ]
    return ["", *(f"{line['name']}, {load}" for line, load in columns)], rows


STUDY = Study("waiting", cases, table, pictures=(), models=("SmolLM2-135M",))

if __name__ == "__main__":
    main(STUDY, __doc__)
