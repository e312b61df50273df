"""How fast do many layer configurations write? Ours together beside loops over them.

Configurations skip the first k or the last k layers, all but the one without layers, for which model.generate has no
way. Every text has the same number of tokens, chosen greedily. A loop is timed on some configurations that keep as many
layers as all do on average, and its time is scaled to all. The floor is the matrix products of the rows that ours
computed; rows that have written the same so far are one. Before any timing the loop's texts are judged: how far below
the best token is each one that it wrote, by plain transformers?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cogsym.bench import floor, method
from cogsym.bench.case import OURS, QUICK_ROUNDS, Case, CaseSpec, Setting, dtype_name
from cogsym.bench.loops import Probe, sliced, texts
from cogsym.bench.method import Variant
from cogsym.bench.models import build, shape_of
from cogsym.bench.sampled import SAMPLE, Question, add_loops, evenly_spaced, sample_facts, table
from cogsym.bench.study import Study
from cogsym.models import read_block
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.generate import generate
from cogsym.sweeps.engine.requests import Generate
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration, configurations, distinct
from cogsym.sweeps.layers.trie import Trie

PROMPT_TOKENS = 40
NEW_TOKENS = {False: 8, True: 16}  # by whether the run is full
CALLS = 60  # times the floor's seconds that ours and the loops together take with the least rounds, about
# Deviations of the logits that a token written is below the best one; one drawn at random is some four below.
AGREE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.2}


def cases(setting: Setting) -> list[CaseSpec]:
    """One prompt; in a full run of the first model more of them, and float32, too."""
    found = []
    for model in setting.models:
        shape = shape_of(model)
        layers = shape.layers if setting.full else setting.layers(shape.layers)
        part = "" if layers == shape.layers else f"{layers} of {shape.layers} layers, "
        chosen = [c for c in distinct(configurations("input,output", layers))[0] if c.k < len(c.actions)]
        wanted = [(1, setting.dtype)]
        if setting.full and model == setting.models[0]:
            wanted += [(8, setting.dtype), (32, setting.dtype)]
            wanted += [(1, torch.float32)] if setting.dtype != torch.float32 else []
        for prompts, dtype in wanted:
            many = "1 prompt" if prompts == 1 else f"{prompts} prompts"
            title = f"{shape.name}, {part}{dtype_name(dtype)}: input + output ({len(chosen)}), {many}"
            build_case = partial(case, model, layers, chosen, prompts, dtype, setting)
            counts, new_tokens = Trie(chosen).counts(), NEW_TOKENS[setting.full]
            forwards = counts.layer_forwards * PROMPT_TOKENS + counts.kept_layers * (new_tokens - 1)
            flops = 2 * prompts * (forwards * shape.layer_weights + len(chosen) * new_tokens * shape.head_weights)
            rounds = method.LEAST_ROUNDS if setting.full else QUICK_ROUNDS
            found.append(CaseSpec(title, build_case, rounds=rounds, seconds=CALLS * flops / setting.rate))
    return found


def case(
    model: str,
    layers: int,
    chosen: Sequence[Configuration],
    prompts: int,
    dtype: torch.dtype,
    setting: Setting,
) -> Case:
    """So many prompts with all loops, verified."""
    probe = Probe(build(model, layers, dtype, setting.device).eval())
    new_tokens = NEW_TOKENS[setting.full]
    requests = draw_prompts(prompts, new_tokens, probe.model)
    engine, head = Engine(ResidentLayers(probe.model)), SweepHead(probe.model)
    trie = Trie(chosen, engine.topology)

    def ours() -> list[list[list[int]]]:
        return write_tokens(engine, head, chosen, requests)

    sample = evenly_spaced(chosen, SAMPLE)
    answers = ours()
    products, rows = generate_floor(engine, head, trie, requests)
    result = Case({OURS: Variant(ours)}, floor=products)
    result.counts[OURS] = {"peak_bytes": method.peak_bytes(ours, setting.device)}
    result.facts = {
        "configurations": len(chosen),
        "requests": len(requests),
        "new_tokens": new_tokens,
        # Of one token and one layer each, after the prompt.
        "layer_forwards": rows,
        "layer_forwards_of_a_loop": trie.counts().kept_layers * prompts * (new_tokens - 1),
        "flops_of_the_floor": products.flops,
        "done": len(chosen) * len(requests) * new_tokens,
    } | sample_facts(sample, chosen)
    question = Question(
        ask=partial(texts, prompts=requests, device=setting.device),
        error=partial(regret, probe.model, sample, requests),
        allowed=AGREE[dtype],
        complaint="its tokens are up to {:.2g} deviations below the best",
        sample=sample,
        configurations=len(chosen),
        requests=len(requests),
        all_logits=(False,),
    )
    result.counts[OURS]["difference"] = error = question.error([answers[chosen.index(c)] for c in sample])
    if not error <= question.allowed:
        result.different[OURS] = question.complaint.format(error)
        del result.variants[OURS]
    add_loops(result, setting, probe, question)
    return result


def draw_prompts(number: int, new_tokens: int, model: Any) -> list[Generate]:
    """Prompts of tokens drawn at random."""
    vocabulary, generator = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary, (number, PROMPT_TOKENS), generator=generator)
    return [Generate(tuple(row), new_tokens) for row in drawn.tolist()]


def write_tokens(
    engine: Engine, head: SweepHead, chosen: Sequence[Configuration], requests: Sequence[Generate]
) -> list[list[list[int]]]:
    """The tokens that each configuration writes to each prompt."""
    answers = generate(engine, head, Trie(chosen, engine.topology), requests, STOPS)
    return [[[int(word) for word in written.text.split()] for written in row] for row in answers]


@torch.inference_mode()
def regret(
    model: Any, sample: Sequence[Configuration], requests: Sequence[Generate], written: Sequence[list[list[int]]]
) -> float:
    """How far below the best token those written are at most, by plain transformers, in deviations of the logits."""
    worst = 0.0
    for configuration, answers in zip(sample, written, strict=True):
        with sliced(model, configuration):
            for request, tokens in zip(requests, answers, strict=True):
                ids = torch.tensor([[*request.tokens, *tokens]], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, len(request.tokens) - 1 : -1].float()
                got = logits.gather(1, ids[0, len(request.tokens) :, None])[:, 0]
                worst = max(worst, ((logits.amax(1) - got) / logits.std(1)).max().item())
    return worst


def generate_floor(
    engine: Engine, head: SweepHead, trie: Trie, requests: Sequence[Generate]
) -> tuple[floor.Products, float]:
    """The products of the rows that one run computes; and its layer-forwards after the prompt."""
    forwards: list[float] = []
    engine.on_forwards = forwards.append
    generate(engine, head, trie, requests, STOPS)
    engine.on_forwards = lambda number: None
    model, prompt = engine.layers.model, sum(len(request.tokens) for request in requests)
    halves: Counter[int] = Counter()  # rows that went through half a layer at a time -> how often
    done, prefill = 0.0, trie.counts().layer_forwards
    for number in forwards:
        halves[round(2 * number) * (prompt if done < prefill else 1)] += 1
        done += number
    products = floor.Products(model.dtype, model.device)
    for rows, times in halves.items():
        for projections in read_block(model.model.layers[0]).projections():
            weight = (sum(projections.sizes), projections.modules[0].weight.shape[1])
            for _ in range(times // 2):  # there are as many halves of attention as of the MLP
                products.add_many(rows, weight)
    for _ in range(requests[0].max_new_tokens):
        products.add_many(len(trie.configurations) * len(requests), tuple(model.lm_head.weight.shape))
    return products, done - prefill


class _IdTokenizer:
    """A tokenizer whose words are the ids."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


STOPS = Stops(_IdTokenizer(), [])  # every text has all its tokens
STUDY = Study("generate", cases, table("tokens"))
