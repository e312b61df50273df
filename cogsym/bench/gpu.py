"""What a GPU is asked, in the order in which an answer is worth most, for `cogsym.bench.supervised` to perform.

Is it right; how fast is each operation; how fast do configurations write and score; how fast is a training step; and
only then, how fast are torch.compile and everybody else. Of each the smaller model comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from cogsym.bench import generate, method, ops, overhead, parity, sweep, train
from cogsym.bench.case import CaseSpec, Setting, dtype_name
from cogsym.bench.models import Shape, shape_of
from cogsym.bench.study import Study
from cogsym.bench.supervised import Stage, Turn
from cogsym.sweeps.layers.configurations import configurations, distinct

MODELS = ("Llama-3.2-1B", "Llama-3.1-8B")
PRECISIONS = (torch.bfloat16, torch.float32, torch.float16)  # the one that is used most comes first
TOKENS = (4, 2048)  # rows and length that operations are measured on
PROMPTS = (1, 8)  # that configurations write to
TRAIN_TOKENS = {"Llama-3.2-1B": (4, 2048), "Llama-3.1-8B": (1, 2048)}  # with all that others keep, within 80 GB
ROOM = 2e9  # bytes that the libraries and what is small take
# The share of the clock by whose end no more turns of a stage begin; what one leaves is the next one's.
UNTIL = {"parity": 0.25, "ops": 0.45, "overhead": 0.48, "generate": 0.6, "sweep": 0.68, "train": 0.76}


def stages(device: str, tiny: bool) -> list[Stage]:
    """All that is asked.

    Args:
        device: "cuda", or "cpu" to see that it works.
        tiny: at a tiny shape, which takes a minute anywhere.
    """
    models = ("tiny",) if tiny else MODELS
    rows, length = (1, 64) if tiny else TOKENS
    setting = Setting(models, torch.device(device), full=True, alternatives=False)
    beside = replace(setting, alternatives=True)
    quick = replace(beside, full=False)  # without torch.compile and whatever else takes long: those come last
    shapes = [shape_of(model) for model in models]

    def stage(name: str, study: Study, turns: Sequence[Turn], of: Setting = setting, limit: float = 60.0) -> Stage:
        return Stage(name, of, turns, study.table, UNTIL.get(name, 1.0), limit)

    def each(make: Callable[[Shape, Setting], list[Turn]], of: Setting) -> list[Turn]:
        return [turn for shape in shapes for turn in make(shape, of)]

    training = partial(train_turns, tokens=(rows, length) if tiny else None)
    return [
        stage("parity", parity.STUDY, parity_turns(setting)),
        stage("ops", ops.STUDY, each(partial(ops_turns, rows=rows, length=length), setting)),
        stage("overhead", overhead.STUDY, [Turn(spec, ROOM) for spec in overhead.cases(setting)]),
        stage("generate", generate.STUDY, each(generate_turns, setting), limit=90),
        stage("sweep", sweep.STUDY, each(sweep_turns, setting), limit=90),
        stage("train", train.STUDY, each(training, setting), limit=90),
        stage("train-beside", train.STUDY, each(training, quick), quick, 120),
        stage("generate-beside", generate.STUDY, each(generate_turns, beside), beside, 120),
        stage("sweep-beside", sweep.STUDY, each(sweep_turns, beside), beside, 120),
        stage("train-compiled", train.STUDY, each(training, beside), beside, 300),
    ]


def parity_turns(setting: Setting) -> list[Turn]:
    """Kernels before whole layers; each in the usual precision first."""
    found = []
    for model in setting.models:
        shape = shape_of(model)
        specs = parity.cases(replace(setting, models=(model,)))
        for dtype in PRECISIONS:
            for spec in specs:
                title, _, name = spec.name.partition(": ")
                if title.endswith(f", {dtype_name(dtype)}"):
                    whole = name.startswith("layers")
                    # With its float64 copy, outputs and gradients of both.
                    weights = 3 * shape.layer_weights + shape.head_weights if whole else shape.head_weights
                    found.append((whole, Turn(spec, ROOM + 24 * weights)))
    return [turn for _, turn in sorted(found, key=lambda item: item[0])]


def ops_turns(shape: Shape, setting: Setting, rows: int, length: int) -> list[Turn]:
    """Every operation and direction in bfloat16."""
    sizes, dtype, found = shape.sizes(rows, length), torch.bfloat16, []
    # PyTorch's logits and their gradient in bfloat16 and float32.
    needed = ROOM + 12 * rows * length * shape.vocabulary + 8 * shape.head_weights
    for name, make in ops.examples().items():
        for direction in make(sizes, dtype, torch.device("meta")).work:
            title = f"{shape.name}, {rows * length} tokens, {dtype_name(dtype)}: {name}, {direction}"
            build = partial(ops.case, name, shape, sizes, dtype, direction, setting.device)
            found.append(Turn(CaseSpec(title, build, ops.ROUNDS), needed))
    return found


def generate_turns(shape: Shape, setting: Setting) -> list[Turn]:
    """Texts from all configurations of the two directions."""
    chosen = [c for c in distinct(configurations("input,output", shape.layers))[0] if c.k < shape.layers]
    found = []
    for prompts in PROMPTS:
        title = f"{shape.name}, {dtype_name(setting.dtype)}: input + output ({len(chosen)}), {prompts} prompts"
        build = partial(generate.case, shape.name, shape.layers, chosen, prompts, setting.dtype, setting)
        found.append(Turn(CaseSpec(title, build, method.LEAST_ROUNDS), _held(shape)))
    return found


def sweep_turns(shape: Shape, setting: Setting) -> list[Turn]:
    """Choices under every configuration of the grid."""
    chosen, asked = distinct(configurations("grid", shape.layers))[0], sweep.ASKED[True]
    title = f"{shape.name}, {dtype_name(setting.dtype)}: grid ({len(chosen)}), {asked} choices"
    build = partial(sweep.case, shape.name, shape.layers, chosen, "choices", asked, setting.dtype, setting)
    return [Turn(CaseSpec(title, build, method.LEAST_ROUNDS), _held(shape))]


def train_turns(shape: Shape, setting: Setting, tokens: tuple[int, int] | None) -> list[Turn]:
    """Both jobs, on `tokens`, rows and length, or on as many as fit."""
    rows, length = tokens or TRAIN_TOKENS[shape.name]
    # Weights; gradients, both moments and float32 weights of a quarter; what is kept; some logits.
    needed = _held(shape) + 3.5 * shape.layers * shape.layer_weights
    needed += rows * length * (20.0 * shape.width * shape.layers + 12 * shape.vocabulary)
    found = []
    for job in train.JOBS:
        title = f"{shape.name}, {rows} x {length} tokens, {dtype_name(setting.dtype)}: {job}"
        build = partial(train.case, shape.name, shape.layers, rows, length, job, setting)
        found.append(Turn(CaseSpec(title, build, method.LEAST_ROUNDS), needed))
    return found


def _held(shape: Shape) -> float:
    """Bytes of a model in bfloat16, and room."""
    return ROOM + 2 * (shape.layers * shape.layer_weights + (1 if shape.tied else 2) * shape.head_weights)
