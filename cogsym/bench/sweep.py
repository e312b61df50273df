"""How fast are many layer configurations scored? Ours in one pass beside loops over them.

Configurations skip the first a and the last b layers, for all a and b (`grid`), or the first k or the last k layers
(`input,output`). Asked are choices between two endings of a question, or passages of which every token is scored, as
long as those of XCOPA and NTREX in Swahili are for SmolLM2; their tokens are drawn at random, as costs do not depend on
them. A loop is timed on some configurations that keep as many layers as all do on average, at its best settings for
half of the layers, and its time is scaled to all. The floor is the matrix products of the different states and of the
head at scored positions. Before any timing a loop's log-likelihoods are compared with ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cogsym.bench import floor, method
from cogsym.bench.case import OURS, QUICK_ROUNDS, Case, CaseSpec, Setting, dtype_name
from cogsym.bench.loops import Probe, likelihoods
from cogsym.bench.method import Variant
from cogsym.bench.models import build, shape_of
from cogsym.bench.plots import draw_curve, draw_ratios
from cogsym.bench.sampled import SAMPLE, Question, add_loops, evenly_spaced, sample_facts, table
from cogsym.bench.study import Study
from cogsym.decoder import layers_of
from cogsym.models import read_block
from cogsym.models.attention import AttentionHalf
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.prefixes import Batch
from cogsym.sweeps.engine.requests import Score
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration, configurations, distinct
from cogsym.sweeps.layers.schedule import schedule
from cogsym.sweeps.layers.trie import Trie

KINDS = ("choices", "passages")
ASKED = {False: 2, True: 8}  # questions or passages, by whether the run is full
CURVE = (4, 16, 64, 256)  # of the grid's configurations, in a full run of the first model
CALLS = 30  # times the floor's seconds that ours and the loops together take with the least rounds, about
# Norm of the difference of log-likelihoods a token over that of their spread; one layer more skipped makes it about 1.
AGREE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def cases(setting: Setting) -> list[CaseSpec]:
    """The grid's choices; in a full run of the first model every set, kind and precision, and parts of the grid."""
    asked, found = ASKED[setting.full], []
    for model in setting.models:
        shape = shape_of(model)
        layers = shape.layers if setting.full else setting.layers(shape.layers)
        part = "" if layers == shape.layers else f"{layers} of {shape.layers} layers, "
        sets = {what: distinct(configurations(what, layers))[0] for what in ("grid", "input,output")}
        wanted = [(sets["grid"], "grid", "choices", setting.dtype)]
        if setting.full and model == setting.models[0]:
            wanted += [
                (sets["grid"], "grid", "passages", setting.dtype),
                (sets["input,output"], "input + output", "choices", setting.dtype),
                (sets["input,output"], "input + output", "passages", setting.dtype),
            ]
            if setting.dtype != torch.float32:
                wanted.append((sets["input,output"], "input + output", "choices", torch.float32))
            parts = [n for n in CURVE if n < len(sets["grid"])]
            wanted += [(evenly_spaced(sets["grid"], n), "part of the grid", "choices", setting.dtype) for n in parts]
        for chosen, what, kind, dtype in wanted:
            title = f"{shape.name}, {part}{dtype_name(dtype)}: {what} ({len(chosen)}), {asked} {kind}"
            build_case = partial(case, model, layers, chosen, kind, asked, dtype, setting)
            counts, requests = Trie(chosen).counts(), questions(kind, asked, shape.vocabulary)
            tokens, scored = sum(len(r.tokens) for r in requests), sum(len(r.tokens) - r.first for r in requests)
            flops = 2 * tokens * counts.layer_forwards * shape.layer_weights
            flops += 2 * scored * counts.head_forwards * shape.head_weights
            rounds = method.LEAST_ROUNDS if setting.full else QUICK_ROUNDS
            found.append(CaseSpec(title, build_case, rounds=rounds, seconds=CALLS * flops / setting.rate))
    return found


def case(
    model: str,
    layers: int,
    chosen: Sequence[Configuration],
    kind: str,
    asked: int,
    dtype: torch.dtype,
    setting: Setting,
) -> Case:
    """One set of configurations with all loops, verified."""
    probe = Probe(build(model, layers, dtype, setting.device).eval())
    requests = questions(kind, asked, probe.model.get_input_embeddings().weight.shape[0])
    engine, head = Engine(ResidentLayers(probe.model)), SweepHead(probe.model)
    trie = Trie(chosen, engine.topology)

    def ours() -> list[list[float]]:
        scores = score(engine, head, Trie(chosen, engine.topology), requests)
        return [[scored.log_likelihood for scored in row] for row in scores]

    sample = evenly_spaced(chosen, SAMPLE)
    answers = ours()
    truth = [answers[chosen.index(c)] for c in sample]
    counts, products = trie.counts(), sweep_floor(probe.model, trie, requests)
    result = Case({OURS: Variant(ours)}, floor=products)
    result.counts[OURS] = {"peak_bytes": method.peak_bytes(ours, setting.device)}
    result.facts = {
        "configurations": len(chosen),
        "requests": len(requests),
        "tokens": sum(len(r.tokens) for r in requests),
        "scored_tokens": sum(len(r.tokens) - r.first for r in requests),
        "layer_forwards": counts.layer_forwards,
        "layer_forwards_of_a_loop": counts.kept_layers,
        "head_forwards": counts.head_forwards,
        "flops_of_the_floor": products.flops,
        "done": len(chosen) * len(requests),
    } | sample_facts(sample, chosen)
    lengths = [len(r.tokens) - r.first for r in requests]
    question = Question(
        ask=partial(likelihoods, requests=requests, device=setting.device),
        error=partial(likelihood_error, truth=truth, lengths=lengths),
        allowed=AGREE[dtype],
        complaint="its likelihoods are {:.1e} of their spread away from ours",
        sample=sample,
        configurations=len(chosen),
        requests=len(requests),
        all_logits=(False, True),
    )
    add_loops(result, setting, probe, question)
    return result


def questions(kind: str, number: int, vocabulary: int) -> list[Score]:
    """So many choices of two endings, or passages, of tokens drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())

    if kind == "passages":
        return [Score(tokens(30, 62), 1) for _ in range(number)]
    found = []
    for _ in range(number):
        question = tokens(14, 24)
        found += [Score(question + tokens(9, 16), len(question)) for _ in range(2)]
    return found


def sweep_floor(model: Any, trie: Trie, requests: Sequence[Score]) -> floor.Products:
    """The products that a trie cannot do without: each layer's for each different state, at scored positions only where
    nothing attends any more, and the head's at scored positions."""
    wanted = [(r, i - 1) for r, request in enumerate(requests) for i in range(request.first, len(request.tokens))]
    batch = Batch([request.tokens[:-1] for request in requests], wanted)
    tokens, scored = len(batch.packed.tokens), len(batch.scored)
    block = read_block(layers_of(model)[0])
    assert isinstance(block.attention, AttentionHalf)
    qkv, output, up, down = ((product.outputs, product.inputs) for product in block.products(1))
    queries, *others = block.attention.qkv.sizes
    q, kv = (queries, qkv[1]), (sum(others), qkv[1])
    head = tuple(model.lm_head.weight.shape)
    rows = dict.fromkeys([qkv, q, kv, output, up, down, head], 0)
    for step in schedule(trie, batch.narrow).steps:
        many = len(step.nodes) * (scored if step.narrow else tokens)
        if step.unit.part != "attention":
            rows[up] += many
            rows[down] += many
        if step.unit.attends:
            rows[output] += many
            rows[q if step.narrow else qkv] += many
            rows[kv] += len(step.nodes) * tokens if step.narrow else 0
    rows[head] += trie.counts().head_forwards * scored
    products = floor.Products(model.dtype, model.device)
    for weight, many in rows.items():
        products.add_many(many, weight)
    return products


def likelihood_error(
    values: Sequence[Sequence[float]], truth: Sequence[Sequence[float]], lengths: Sequence[int]
) -> float:
    """Norm of the difference of log-likelihoods a token, [configuration][request], over that of their spread."""
    per = torch.tensor(lengths, dtype=torch.float64)
    a, b = (torch.tensor(v, dtype=torch.float64) / per for v in (values, truth))
    return float((a - b).norm() / (b - b.mean()).norm())


STUDY = Study("sweep", cases, table("answers"), (draw_ratios, draw_curve))
