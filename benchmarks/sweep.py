"""Scoring many layer configurations: `cogsym`'s engine beside a plain loop over transformers models, and the floor.

    python benchmarks/sweep.py --model SMOLLM2_FOLDER --data TEXT_FOLDER [--cases N]

Configurations are the grid of the first a and last b layers skipped, or those of the two directions alone; tasks are
XCOPA in Swahili (two options a question) and NTREX in Swahili (bits per byte of text, every token scored). The loop
(`benchmarks/loop.py`) makes a model of the kept layers for each configuration, at the batch size, attention
implementation and way of taking logits that are fastest here for half of the layers. It is timed on configurations
evenly spaced over those sorted by how many layers they keep, and a line through their times by kept layers gives the
whole loop. The floor is the matrix products alone: each layer's for each state of the trie, at scored positions only
where nothing attends any more, and the head's at scored positions; each timed on 2,048 rows into memory that is there,
and scaled. Before any timing the log-likelihoods of the sample are compared. Variants take turns, A B A B.

Results: `benchmarks/results/sweep.json` and `sweep.png`. A case that is there from the same machine and versions is
not measured again; --cases ends after so many new ones. One during which other work took the processors is not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import loop
import torch
from loop import Settings

from cogsym.bench import machine
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.batch import Batch
from cogsym.sweeps.configs import Configuration
from cogsym.sweeps.engine import Engine
from cogsym.sweeps.heads import SweepHead
from cogsym.sweeps.layers import ResidentLayers
from cogsym.sweeps.requests import Score
from cogsym.sweeps.score import score
from cogsym.sweeps.trie import Trie

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# (dtype, configurations, task) -> documents, so many that a round takes some ten seconds.
CASES = {
    ("bfloat16", "grid", "xcopa-sw"): 8,
    ("bfloat16", "grid", "ntrex-sw"): 4,
    ("bfloat16", "input,output", "xcopa-sw"): 12,
    ("bfloat16", "input,output", "ntrex-sw"): 8,
    ("float32", "grid", "xcopa-sw"): 2,
    ("float32", "grid", "ntrex-sw"): 1,
    ("float32", "input,output", "xcopa-sw"): 4,
    ("float32", "input,output", "ntrex-sw"): 2,
}
SAMPLE, ROUNDS, FLOOR_ROWS, FLOOR_COLUMNS = 6, 3, 2048, 2048
CURVE = (1, 4, 16, 64, 128, 256, 466)
CURVE_CASE = ("bfloat16", "grid", "xcopa-sw")
AGREE = {"float32": 2e-3, "bfloat16": 1.0}  # nats a token, at most


class Bench:
    """A model and requests, ours and the loop on them."""

    def __init__(self, folder: Path, data: Path, dtype: str, task: str, documents: int) -> None:
        self.model = load_model(folder, DTYPES[dtype]).eval()
        self.layers = ResidentLayers(self.model)
        self.engine, self.head = Engine(self.layers), SweepHead(self.model)
        chosen = loop.task_documents(task, data, load_tokenizer(folder))[:documents]
        self.requests = [request for document in chosen for request in document.requests if isinstance(request, Score)]

    def ours(self, configurations: Sequence[Configuration]) -> list[list[float]]:
        """[configuration][request]."""
        answers = score(self.engine, self.head, Trie(configurations), self.requests)
        return [[scored.log_likelihood for scored in row] for row in answers]

    def theirs(self, configuration: Configuration, settings: Settings) -> list[float]:
        """The loop's answers for one configuration."""
        with loop.sliced(self.model, configuration) as model:
            model.set_attn_implementation(settings.attention)
            return loop.likelihoods(model, self.requests, settings)

    def best(self) -> tuple[Settings, dict[Settings, float]]:
        """The loop's best settings, on a model of half of the layers."""
        half = len(self.model.model.layers) // 2
        configuration = Configuration.of(2 * half, {"skip": range(half)})

        batches = [b for b in (1, 4, 16, 64) if b <= len(self.requests)]
        candidates = (
            lambda now: [replace(now, attention=a, all_logits=b) for a in ("sdpa", "eager") for b in (False, True)],
            lambda now: [replace(now, batch=b) for b in batches],
        )
        first = Settings("sdpa", max(b for b in batches if b <= 16))
        return loop.fastest(lambda settings: self.theirs(configuration, settings), candidates, first)

    def floor(self, trie: Trie) -> Callable[[], float]:
        """Seconds of the products that the trie cannot do without."""
        first = [
            (r, i - 1) for r, request in enumerate(self.requests) for i in range(request.first, len(request.tokens))
        ]
        batch = Batch([request.tokens[:-1] for request in self.requests], first)
        tokens, scored = len(batch.layout.tokens), len(batch.scored)
        block = next(self.layers.walk([(0, {"model"})]))["model"].block
        assert block is not None
        shapes = {
            name: (sum(projections.sizes), projections.modules[0].weight.shape[1])
            for name, projections in zip(("qkv", "output", "gate_up", "down"), block.projections(), strict=True)
        }
        q, kv = block.qkv.sizes[0], sum(block.qkv.sizes[1:])
        shapes |= {"q": (q, shapes["qkv"][1]), "kv": (kv, shapes["qkv"][1]), "head": self.model.lm_head.weight.shape}
        rows = dict.fromkeys(shapes, 0)
        for step in trie.schedule(batch.narrow).steps:
            many = len(step.nodes) * (scored if step.narrow else tokens)
            if step.unit.part == "mlp":
                rows["gate_up"] += many
                rows["down"] += many
            elif step.narrow:
                rows["kv"] += len(step.nodes) * tokens
                rows["q"] += many
                rows["output"] += many
            else:
                rows["qkv"] += many
                rows["output"] += many
        rows["head"] = trie.counts().head_forwards * scored
        products = {name: product(shape, self.model.dtype) for name, shape in shapes.items() if rows[name]}

        def seconds() -> float:
            return sum(loop.timed(run) * rows[name] / FLOOR_ROWS for name, run in products.items())

        return seconds


def product(shape: tuple[int, int], dtype: torch.dtype) -> Callable[[], object]:
    """A linear map by a weight of `shape` on FLOOR_ROWS rows, of few columns at a time so that they stay in cache."""
    x, weight = torch.randn(FLOOR_ROWS, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    pieces = [piece.t() for piece in weight.split(FLOOR_COLUMNS)] if shape[0] > 2 * FLOOR_COLUMNS else [weight.t()]
    out = [torch.empty(FLOOR_ROWS, piece.shape[1], dtype=dtype) for piece in (pieces[0], pieces[-1])]

    def run() -> None:
        for piece in pieces:
            torch.mm(x, piece, out=out[0] if piece.shape == pieces[0].shape else out[1])

    run()
    return run


def measure(bench: Bench, dtype: str, what: str, task: str) -> dict[str, Any]:
    """One case."""
    every = loop.chosen(what, len(bench.model.model.layers))
    trie, sample = Trie(every), loop.spaced(every, SAMPLE)
    settings, tried = bench.best()
    watch = loop.Watch()
    print(settings, flush=True)
    ours, off = bench.ours(every), 0.0  # warms up, too
    for configuration in sample:
        lines = zip(
            ours[every.index(configuration)], bench.theirs(configuration, settings), bench.requests, strict=True
        )
        off = max(off, *(abs(a - b) / (len(r.tokens) - r.first) for a, b, r in lines))
    if off > AGREE[dtype]:
        raise SystemExit(f"{dtype}, {what}, {task}: the loop differs by {off:.3g} nats a token, so it is not timed.")
    floor = bench.floor(trie)
    variants = {"cogsym": lambda: bench.ours(every)}
    variants |= {c.code: (lambda c=c: bench.theirs(c, settings)) for c in sample}
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    floors = []
    for _ in range(ROUNDS if dtype == "bfloat16" else 2):
        for label, times in loop.turns(variants, 1).items():
            seconds[label] += times
        floors.append(statistics.median(floor() for _ in range(5)))
    return {
        "dtype": dtype,
        "configurations": what,
        "task": task,
        "documents": CASES[dtype, what, task],
        "requests": len(bench.requests),
        "tokens": sum(len(r.tokens) for r in bench.requests),
        "scored_tokens": sum(len(r.tokens) - r.first for r in bench.requests),
        "counts": asdict(trie.counts()) | {"layer_forwards": trie.counts().layer_forwards},
        "largest_difference_nats_a_token": off,
        **loop.outcome(settings, tried, sample, every, seconds, floors, watch),
    }


def measure_curve(bench: Bench) -> dict[str, Any]:
    """Seconds, and what the trie counts, for more and more configurations of the grid."""
    every = loop.chosen("grid", len(bench.model.model.layers))
    sets = {n: loop.spaced(every, n) for n in CURVE if n <= len(every)}
    seconds = loop.turns({str(n): (lambda c=chosen: bench.ours(c)) for n, chosen in sets.items()}, 2)
    counts = {n: Trie(chosen).counts() for n, chosen in sets.items()}
    return {
        "case": CURVE_CASE,
        "documents": CASES[CURVE_CASE],
        "configurations": list(sets),
        "seconds": [min(seconds[str(n)]) for n in sets],
        "layer_forwards": [count.layer_forwards for count in counts.values()],
        "kept_layers": [count.kept_layers for count in counts.values()],
        "head_forwards": [count.head_forwards for count in counts.values()],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Cost against the number of configurations: seconds, and layers computed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cogsym import plotting

    # Without the first, which is the model without layers: no forward has no logarithm.
    curve = {name: values[1:] for name, values in result["curve"].items() if name not in ("case", "documents")}
    case = next(c for c in result["cases"] if (c["dtype"], c["configurations"], c["task"]) == CURVE_CASE)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    xs, whole = curve["configurations"], case["counts"]
    times = case["seconds_of_each_round"]["loop_sample"]
    rest = case["seconds"]["loop"] / whole["configurations"]
    left.plot(xs, curve["seconds"], "o-", color=plotting.BLUE, label="cogsym")
    left.plot(xs, [rest * n for n in xs], "--", color=plotting.VERMILION, label="loop over transformers models")
    left.set(
        ylabel="seconds",
        title=f"{len(times)} rounds, {case['documents']} questions of {case['task']}, {case['dtype']}",
    )
    right.plot(xs, curve["layer_forwards"], "o-", color=plotting.BLUE, label="layers computed, shared")
    right.plot(xs, curve["kept_layers"], "--", color=plotting.VERMILION, label="layers computed by the loop")
    right.plot(xs, curve["head_forwards"], ":", color=plotting.BLACK, label="heads computed, by either")
    right.set(ylabel="forwards of all tokens", title="what the trie counts")
    for axis in (left, right):
        plotting.strip(axis)
        axis.set(xlabel="configurations of the grid", xscale="log", yscale="log")
        axis.legend(frameon=False)
    figure.tight_layout()
    plotting.save(figure, [path])


def main() -> None:
    """Measure what is missing, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=len(CASES), help="end after so many new ones")
    args = parser.parse_args()
    path = RESULTS / "sweep.json"
    here: dict[str, Any] = {
        "command": "python benchmarks/sweep.py --model SMOLLM2_FOLDER --data TEXT_FOLDER",
        "machine": machine.describe(),
        "model": "SmolLM2-135M-Instruct",
    }
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known = before if all(before.get(key) == value for key, value in here.items()) else {}
    result = here | {"cases": known.get("cases", []), "curve": known.get("curve")}
    done = {(c["dtype"], c["configurations"], c["task"]) for c in result["cases"]}
    if result["curve"] is None:
        dtype, _, task = CURVE_CASE
        result["curve"] = measure_curve(Bench(args.model, args.data, dtype, task, CASES[CURVE_CASE]))
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    left = args.cases
    for (dtype, what, task), documents in CASES.items():
        if (dtype, what, task) not in done and left:
            case = measure(Bench(args.model, args.data, dtype, task, documents), dtype, what, task)
            summary = {k: case[k] for k in ("dtype", "configurations", "task", "seconds", "loop_over_cogsym")}
            print(json.dumps(summary | {"over_floor": case["cogsym_over_floor"]}), flush=True)
            left -= 1
            if (others := case["share_of_processors_used_by_others"]) > loop.MOST_OTHERS:
                print(f"Not kept: other work took {others:.0%} of the processors.", flush=True)
                continue
            result["cases"].append(case)
            path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if any((c["dtype"], c["configurations"], c["task"]) == CURVE_CASE for c in result["cases"]):
        plot(json.loads(path.read_text("utf-8")), RESULTS / "sweep.png")


if __name__ == "__main__":
    main()
