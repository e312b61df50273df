"""A checkpoint in bfloat16 where products are in float32, as `--dtype auto` has it without a unit for bfloat16.

    python benchmarks/stored.py

Beside the same in float32 throughout, and beside transformers in float32: a training step of 1,024 tokens with the
outer quarter trained, layer configurations scored and written by, one row, eight and thirty-two. On a processor with a
unit for bfloat16 the figures are of interest with slower instructions forced: docs/cpu.md has the command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cogsym.bench import generate, method, sweep, train
from cogsym.bench.case import OURS, Case, CaseSpec, Line, Setting
from cogsym.bench.method import Variant
from cogsym.bench.models import build, shape_of
from cogsym.bench.report import Table, by_variant, spread
from cogsym.bench.study import Study, main
from cogsym.bench.trainers import COMPETITORS
from cogsym.models import precision
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration, configurations, distinct
from cogsym.sweeps.layers.trie import Trie

WIDE = f"{OURS}, weights in float32"
PLAIN = "transformers, SDPA"
LENGTHS, TOKENS = (256, 1024), 1024
LAYERS = 4  # of a model in a quick run
ROUNDS = 3


def cases(setting: Setting) -> list[CaseSpec]:
    found = []
    for model in setting.models:
        shape = shape_of(model)
        layers = shape.layers if setting.full else LAYERS
        tokens = TOKENS if setting.full else TOKENS // 8
        sets = {what: distinct(configurations(what, layers))[0] for what in ("grid", "input,output")}
        writing = [c for c in sets["input,output"] if c.k < layers]
        for length in LENGTHS if setting.full else LENGTHS[:1]:
            rows = max(1, tokens // length)
            name = f"{shape.name}: a step, {rows} x {length} tokens"
            found.append(CaseSpec(name, partial(step, model, layers, rows, length, setting), ROUNDS))
        asked = [("input,output", "choices"), ("input,output", "passages"), ("grid", "choices")]
        for what, kind in asked if setting.full else asked[:1]:
            name = f"{shape.name}: {what} ({len(sets[what])}), 8 {kind}"
            found.append(CaseSpec(name, partial(scored, model, layers, sets[what], kind, setting), ROUNDS))
        for prompts in (1, 8, 32) if setting.full else (1,):
            name = f"{shape.name}: written by {len(writing)}, {prompts} prompt{'s' * (prompts > 1)}"
            found.append(CaseSpec(name, partial(written, model, layers, writing, prompts, setting), ROUNDS))
    return found


def step(model: str, layers: int, rows: int, length: int, setting: Setting) -> Case:
    stored = train.make_job(model, layers, rows, length, False, setting.device, torch.bfloat16)
    wide = train.make_job(model, layers, rows, length, False, setting.device, torch.float32)
    wide.model.load_state_dict(stored.model.state_dict())
    precision.widen(stored.model)
    stored = dataclasses.replace(stored, autocast=wide.autocast)
    ours, plain = (next(c for c in COMPETITORS if c.name == name) for name in (OURS, PLAIN))
    result = Case(floor=train.step_floor(wide), facts={"tokens": rows * length, "done": rows * length})
    for label, job, competitor in ((OURS, stored, ours), (WIDE, wide, ours), (PLAIN, wide, plain)):
        optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad], 1e-6, fused=True)
        take = partial(train.take_step, optimizer)
        result.variants[label] = competitor.variant(job, take)
        with competitor.applied(job) as loss:
            take(loss)
            peak = method.peak_bytes(partial(take, loss), job.device)
        result.counts[label] = {"peak_bytes": peak, "weight_bytes": weight_bytes(job.model)}
    return result


def scored(model: str, layers: int, chosen: list[Configuration], kind: str, setting: Setting) -> Case:
    result = sweep.case(model, layers, chosen, kind, 8, torch.float32, dataclasses.replace(setting, full=False))
    net = stored_model(model, layers, setting)
    requests = sweep.questions(kind, 8, net.get_input_embeddings().weight.shape[0])
    engine, head = Engine(ResidentLayers(net)), SweepHead(net)
    return beside(result, net, setting, lambda: score(engine, head, Trie(chosen, engine.topology), requests))


def written(model: str, layers: int, chosen: list[Configuration], prompts: int, setting: Setting) -> Case:
    result = generate.case(model, layers, chosen, prompts, torch.float32, dataclasses.replace(setting, full=False))
    net = stored_model(model, layers, setting)
    requests = generate.draw_prompts(prompts, generate.NEW_TOKENS[False], net)
    engine, head = Engine(ResidentLayers(net)), SweepHead(net)
    return beside(result, net, setting, lambda: generate.write_tokens(engine, head, chosen, requests))


def stored_model(model: str, layers: int, setting: Setting) -> Any:
    net = build(model, layers, torch.bfloat16, setting.device).eval()
    precision.widen(net)
    return net


def beside(result: Case, net: Any, setting: Setting, run: Callable[[], object]) -> Case:
    """The case of float32 with the stored weights' run as what the others are held against."""
    peak, wide = method.peak_bytes(run, setting.device), 2 * weight_bytes(net)
    result.variants = {OURS: Variant(run), WIDE: result.variants.pop(OURS)} | result.variants
    result.counts[WIDE] = result.counts.pop(OURS) | {"weight_bytes": wide}
    result.counts[OURS] = {"peak_bytes": peak, "weight_bytes": weight_bytes(net)}
    return result


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def cells(line: Line, result: dict[str, Any]) -> dict[str, str]:
    weights = result.get("weight_bytes")
    return {
        "seconds": f"{result['seconds']:.3g}",
        "tokens, answers or tokens a second": f"{line['facts']['done'] / result['seconds']:,.0f}",
        "over the floor": f"{result['over_floor']['median']:.2f}",
        "time / cogsym": spread(result.get("over_cogsym")),
        "peak, MB": f"{result['peak_bytes'] / 1e6:,.0f}",
        "weights, MB": f"{weights / 1e6:,.0f}" if weights else "",
    }


def table(lines: list[Line]) -> Table:
    return by_variant(cells)(lines)


STUDY = Study("stored", cases, table, models=("SmolLM2-135M",))

if __name__ == "__main__":
    main(STUDY, __doc__)
