"""What does Python cost beside the kernels? A call of each operation on a tiny tensor, and a decoding step of few rows.

At a tiny shape no kernel takes more than a few microseconds, so what is left is dispatch: without a gradient, as a
sweep calls an operation; recorded for one, as training does; and with the backward pass. A decoding step is that of a
model of four tiny layers, one token of each of four rows, beside transformers' own `generate`.
"""

from __future__ import annotations

from functools import partial

import torch

from cogsym.bench import report
from cogsym.bench.case import OURS, QUICK_ROUNDS, Case, CaseSpec, Line, Setting
from cogsym.bench.generate import draw_prompts, write_tokens
from cogsym.bench.loops import LOOPS, LoopOptions, Probe, texts
from cogsym.bench.method import Variant
from cogsym.bench.models import SHAPES, build
from cogsym.bench.ops import PLAIN, directed, examples, results
from cogsym.bench.study import Study
from cogsym.ops.operation import MakeExample
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration

TINY, TOKENS = "tiny", 2  # the shape, and the tokens of an operation's one row
ROWS, NEW_TOKENS = 4, 16


def cases(setting: Setting) -> list[CaseSpec]:
    """Each operation, and a step; the models that are asked for do not matter."""
    builds = {f"a call: {name}": partial(call, make, setting) for name, make in examples().items()}
    builds[f"a decoding step: {SHAPES[TINY].layers} layers, {ROWS} rows"] = partial(step, setting)
    return [CaseSpec(name, build, rounds=15 if setting.full else QUICK_ROUNDS) for name, build in builds.items()]


def call(make: MakeExample, setting: Setting) -> Case:
    """One operation, ours and PyTorch's."""
    example = make(SHAPES[TINY].sizes(1, TOKENS), torch.float32, setting.device)
    result = Case()
    for label, function in ((OURS, example.ours), (PLAIN, example.plain)):
        _, dout = results(example, function)
        result.variants[label] = Variant(directed(example, function, "forward", dout))
        if example.differentiated:
            result.variants[f"{label}, recorded"] = Variant(partial(function, **example.inputs))
            result.variants[f"{label}, with backward"] = Variant(directed(example, function, "both", dout))
    return result


def step(setting: Setting) -> Case:
    """One token of each row, ours and transformers'."""
    probe = Probe(build(TINY, None, torch.float32, setting.device).eval())
    engine, head = Engine(ResidentLayers(probe.model)), SweepHead(probe.model)
    whole = Configuration.of(SHAPES[TINY].layers, {})
    prompts = draw_prompts(ROWS, NEW_TOKENS, probe.model)
    loop = partial(
        texts, configuration=whole, settings=LoopOptions("sdpa", ROWS), prompts=prompts, device=setting.device
    )
    return Case(
        {
            OURS: Variant(partial(write_tokens, engine, head, [whole], prompts), scale=1 / NEW_TOKENS),
            "transformers": LOOPS[0].variant(probe, loop, scale=1 / NEW_TOKENS),
        }
    )


def table(lines: list[Line]) -> report.Table:
    """Microseconds of every variant."""
    labels = dict.fromkeys(label for line in lines for label in line["variants"])
    rows = []
    for line in lines:
        seconds = {label: result["seconds"] for label, result in line["variants"].items()}
        rows.append([line["name"], *(f"{1e6 * seconds[label]:,.1f}" if label in seconds else "" for label in labels)])
    return ["microseconds", *labels], rows


STUDY = Study("overhead", cases, table)
