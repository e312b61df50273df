"""Writing under many layer configurations: `cogsym`'s engine beside a plain loop over model.generate, and the floor.

    python benchmarks/generate.py --model SMOLLM2_FOLDER --data TEXT_FOLDER [--cases N]

Configurations skip the first k or the last k layers, for every k: 62 pairs of a direction and k for 30 layers, 60 of
them distinct, which is what both sides compute. Prompts are the first tokens of Swahili news sentences; every text is
NEW_TOKENS long. The loop (`benchmarks/loop.py`) makes a model of the kept layers for each configuration and calls
model.generate on left-padded batches, at the batch size and attention implementation that are fastest here for half of
the layers; it is timed on evenly spaced configurations, and a line through their times by kept layers gives the whole
loop. The floor is the matrix products of the rows that our engine computed (a state that rows share is one), each timed
alone. Before any timing the texts of the sample are compared. Variants take turns, A B A B.

Results: `benchmarks/results/generate.json`. A case that is there from the same machine and versions is not measured
again; --cases ends after so many new ones. One during which other work took the processors is not kept.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import loop
import torch
from loop import Settings

from cogsym.bench import machine
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps.choose import Stops
from cogsym.sweeps.configs import Configuration
from cogsym.sweeps.engine import Engine
from cogsym.sweeps.generate import generate
from cogsym.sweeps.heads import SweepHead
from cogsym.sweeps.layers import ResidentLayers
from cogsym.sweeps.requests import Generate
from cogsym.sweeps.trie import Trie

RESULT = Path(__file__).parent / "results" / "generate.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CASES = [(dtype, prompts) for dtype in DTYPES for prompts in (1, 8, 32)]
CONFIGURATIONS = "input,output"
NEW_TOKENS, PROMPT_TOKENS, SAMPLE, ROUNDS = 24, 48, 6, 3


class Bench:
    """A model and prompts, ours and the loop on them."""

    def __init__(self, folder: Path, data: Path, dtype: str, prompts: int) -> None:
        self.model, self.tokenizer = load_model(folder, DTYPES[dtype]).eval(), load_tokenizer(folder)
        self.layers = ResidentLayers(self.model)
        self.engine, self.head = Engine(self.layers), SweepHead(self.model)
        documents = loop.task_documents("ntrex-sw", data, self.tokenizer)[:prompts]
        self.prompts = [Generate(d.requests[0].tokens[:PROMPT_TOKENS], NEW_TOKENS) for d in documents]

    def ours(self, trie: Trie) -> list[list[str]]:
        """[configuration][prompt]."""
        answers = generate(self.engine, self.head, trie, self.prompts, Stops(self.tokenizer, []))
        return [[generated.text for generated in row] for row in answers]

    def theirs(self, configuration: Configuration, settings: Settings) -> list[str]:
        """The loop's texts for one configuration."""
        texts: list[str] = []
        with loop.sliced(self.model, configuration) as model, torch.inference_mode():
            model.set_attn_implementation(settings.attention)
            for begin in range(0, len(self.prompts), settings.batch):
                rows = [prompt.tokens for prompt in self.prompts[begin : begin + settings.batch]]
                longest = max(map(len, rows))
                ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
                written = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                texts += self.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return texts

    def best(self) -> tuple[Settings, dict[Settings, float]]:
        """The loop's best settings, on a model of half of the layers."""
        half = len(self.model.model.layers) // 2
        configuration = Configuration.of(2 * half, {"skip": range(half)})

        batches = [b for b in (1, 8, 32) if b <= len(self.prompts)]
        candidates = (
            lambda now: [replace(now, attention=a) for a in ("sdpa", "eager")],
            lambda now: [replace(now, batch=b) for b in batches],
        )
        first = Settings("sdpa", len(self.prompts))
        return loop.fastest(lambda settings: self.theirs(configuration, settings), candidates, first)

    def floor(self, trie: Trie) -> Callable[[], float]:
        """Seconds of the products of the rows that were computed."""
        halves: Counter[int] = Counter()  # rows that went through half a layer at a time -> how often
        prompt_tokens = sum(len(prompt.tokens) for prompt in self.prompts)
        told: list[float] = []
        self.engine.on_forwards = told.append
        self.ours(trie)
        self.engine.on_forwards = lambda number: None
        prefill = trie.counts().layer_forwards
        before = 0.0
        for number in told:
            halves[round(2 * number) * (prompt_tokens if before < prefill else 1)] += 1
            before += number
        block = next(self.layers.walk([(0, {"model"})]))["model"].block
        assert block is not None
        shapes = [
            (sum(projections.sizes), projections.modules[0].weight.shape[1]) for projections in block.projections()
        ]
        head = self.model.lm_head.weight.shape
        rows_of_head = len(trie.configurations) * len(self.prompts)

        def seconds() -> float:
            # A half is on average half of a block's products.
            layers = sum(times * products(rows, shapes, self.model.dtype) / 2 for rows, times in halves.items())
            return layers + NEW_TOKENS * products(rows_of_head, [head], self.model.dtype)

        return seconds


def products(rows: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, at_most: int = 2048) -> float:
    """Seconds of linear maps by weights of these shapes, the best of five; many rows are scaled from fewer."""
    here = min(rows, at_most)
    operands = [
        (torch.randn(here, k).to(dtype), torch.randn(n, k).to(dtype).t(), torch.empty(here, n, dtype=dtype))
        for n, k in shapes
    ]

    def run() -> None:
        for x, weight, out in operands:
            torch.mm(x, weight, out=out)

    run()
    return min(loop.timed(run) for _ in range(5)) * rows / here


def measure(bench: Bench, dtype: str, prompts: int) -> dict[str, Any]:
    """One case."""
    every = loop.chosen(CONFIGURATIONS, len(bench.model.model.layers))
    # A model without layers has no cache, for which model.generate has no way: the line tells its time.
    trie, sample = Trie(every), loop.spaced([c for c in every if c.k < len(c.actions)], SAMPLE)
    settings, tried = bench.best()
    watch = loop.Watch()
    print(settings, flush=True)
    ours = bench.ours(trie)  # warms up, too
    pairs = [pair for c in sample for pair in zip(ours[every.index(c)], bench.theirs(c, settings), strict=True)]
    equal = sum(a == b for a, b in pairs) / len(pairs)
    if dtype == "float32" and equal < 1:
        raise SystemExit(f"{dtype}, {prompts} prompts: {1 - equal:.1%} of the texts differ, so the loop is not timed.")
    variants: dict[str, Callable[[], object]] = {"cogsym": lambda: bench.ours(trie)}
    variants |= {c.code: (lambda c=c: bench.theirs(c, settings)) for c in sample}
    seconds = loop.turns(variants, ROUNDS)
    floor = bench.floor(trie)
    floors = [floor() for _ in range(ROUNDS)]
    return {
        "dtype": dtype,
        "prompts": prompts,
        "configurations": CONFIGURATIONS,
        "distinct_configurations": len(every),
        "prompt_tokens": sum(len(prompt.tokens) for prompt in bench.prompts),
        "new_tokens": NEW_TOKENS,
        "share_of_equal_texts": equal,
        **loop.outcome(settings, tried, sample, every, seconds, floors, watch),
    }


def main() -> None:
    """Measure what is missing and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=len(CASES), help="end after so many new ones")
    args = parser.parse_args()
    here: dict[str, Any] = {
        "command": "python benchmarks/generate.py --model SMOLLM2_FOLDER --data TEXT_FOLDER",
        "machine": machine.describe(),
        "model": "SmolLM2-135M-Instruct",
    }
    before = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    known = before if all(before.get(key) == value for key, value in here.items()) else {}
    result = here | {"cases": known.get("cases", [])}
    done = {(c["dtype"], c["prompts"]) for c in result["cases"]}
    for dtype, prompts in [case for case in CASES if case not in done][: args.cases]:
        case = measure(Bench(args.model, args.data, dtype, prompts), dtype, prompts)
        summary = {k: case[k] for k in ("dtype", "prompts", "share_of_equal_texts", "seconds", "loop_over_cogsym")}
        print(json.dumps(summary | {"over_floor": case["cogsym_over_floor"]}), flush=True)
        if (others := case["share_of_processors_used_by_others"]) > loop.MOST_OTHERS:
            print(f"Not kept: other work took {others:.0%} of the processors.", flush=True)
            continue
        result["cases"].append(case)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
