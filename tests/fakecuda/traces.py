"""What a training step and a sweep ask of a CUDA device, counted on one that computes nothing.

    python tests/fakecuda/traces.py [NAME ...]

prints the counts that tests/guard/expected.json holds, as JSON; with names, such as "llama, packed, all", what is
launched and who waits. Counts "a layer" are those of one more layer in the middle; "besides" is all the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import device  # before torch
import torch
import transformers
from tiny_models import EVERY, tiny_model

import cogsym
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.generate import generate
from cogsym.sweeps.engine.requests import Generate, Score
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.trie import Trie

# Primes: a tensor whose size is a multiple of their product holds one number for each pair.
TOKENS, VOCABULARY = 1021, 20011
FORBIDDEN = {"tokens x tokens": TOKENS**2, "tokens x vocabulary": TOKENS * VOCABULARY}
KEEPS = ("all", "attention", "offload", "nothing")
KINDS = ("plain", "packed", "padded-right", "padded-left")
FAMILIES = ("gemma2", "gemma3", "qwen3-windows-biases", "phi3-partial", "olmo2", "cohere", "apertus")
FEW, MANY = 4, 6  # layers, of which the first and the last are trained

Trace = Callable[[int], device.Device]  # with so many layers


def model(variant: str, layers: int) -> Any:
    """A model of a family that exists on the device, in bfloat16."""
    changes = {
        "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "head_dim": 16,
        "num_hidden_layers": layers, "max_position_embeddings": 2 * TOKENS,
    }  # fmt: skip
    if types := EVERY[variant][1].get("layer_types"):
        changes["layer_types"] = types[:2] * (layers // 2)
    # Made in that dtype: fake parameters cannot be converted.
    still = mock.patch.object(transformers.PreTrainedModel, "to", lambda self, dtype: self)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), still:
            return tiny_model(variant, torch.bfloat16, **changes)
    finally:
        torch.set_default_dtype(before)


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Three rows as a Trainer gives them to a model."""
    ids = torch.randint(VOCABULARY, (3, TOKENS))
    lengths, place = torch.tensor([[TOKENS], [800], [300]]), torch.arange(TOKENS)
    inputs = {"input_ids": ids, "labels": ids}
    if kind == "packed":
        inputs["position_ids"] = place - torch.where(place >= lengths, lengths, 0)
    elif kind != "plain":
        inputs["attention_mask"] = (place < lengths if kind == "padded-right" else place >= TOKENS - lengths).long()
    return {name: x.to("cuda") for name, x in inputs.items()}


def step(variant: str, kind: str, keep: str, layers: int) -> device.Device:
    """Forward and backward pass of a step."""
    with device.Device(FORBIDDEN).there() as traced:
        planned = cogsym.LayerPlan.outer(layers, front=1, back=1)
        prepared, inputs = cogsym.prepare(model(variant, layers), planned, keep=keep).train(), batch(kind)
        traced.forget()
        prepared(**inputs, use_cache=False).loss.backward()
    return traced


def swept(variant: str, run: Callable[[Engine, SweepHead, Trie], Any], layers: int) -> device.Device:
    """A sweep of which each further layer has the same states to compute."""
    skipped = ([], [0], [1], [0, 1])
    with device.Device(FORBIDDEN).there() as traced:
        source = ResidentLayers(model(variant, layers))
        engine = Engine(source)
        trie = Trie([Configuration.of(layers, {"skip": each}) for each in skipped], engine.topology)
        traced.forget()
        run(engine, SweepHead(source.model), trie)
    return traced


def scoring(variant: str, layers: int) -> device.Device:
    """Three texts, two of which begin alike: 1021 tokens in one row."""
    told = range(2, 2 + 401), (*range(2, 202), *range(1000, 1151)), range(2000, 2472)
    asked = [Score(tuple(tokens), len(tokens) - 5) for tokens in told]
    return swept(variant, lambda engine, head, trie: score(engine, head, trie, asked), layers)


def writing(variant: str, tokens: int, layers: int) -> device.Device:
    """So many tokens behind two prompts, each row writing others."""

    class Words:
        def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
            return ""

    prompts = [Generate(tuple(range(first, first + 40)), tokens) for first in (0, 100)]
    return swept(variant, lambda engine, head, trie: generate(engine, head, trie, prompts, Stops(Words(), [])), layers)


def traces() -> dict[str, Trace]:
    """What is traced, by name."""
    found: dict[str, Trace] = {}
    for kind in KINDS:
        for keep in KEEPS if kind == "packed" else KEEPS[:1]:
            found[f"llama, {kind}, {keep}"] = partial(step, "llama", kind, keep)
    for family in FAMILIES:
        found[f"{family}, packed, attention"] = partial(step, family, "packed", "attention")
    for family in ("llama", "gemma2"):
        found[f"{family}, scoring"] = partial(scoring, family)
    return found


def counts() -> dict[str, float]:
    """The numbers of the guard's table."""
    found: dict[str, float] = {}
    for name, trace in traces().items():
        few, many = trace(FEW), trace(MANY)
        found[f"{name}: forbidden tensors"] = many.forbidden.total()
        for what in ("launches", "waits"):
            less, more = getattr(few, what).total(), getattr(many, what).total()
            found[f"{name}: {what} a layer"] = a_layer = (more - less) / (MANY - FEW)
            found[f"{name}: {what} besides"] = less - (FEW - 2) * a_layer
    short, long = writing("llama", 6, FEW), writing("llama", 8, FEW)
    for what in ("launches", "waits"):
        found[f"llama, writing: {what} a token"] = (getattr(long, what).total() - getattr(short, what).total()) / 2
    found["llama, writing: kernels compiled"] = len(long.variants)
    found["llama, writing: forbidden tensors"] = long.forbidden.total()
    return found


def main() -> None:
    """Print them."""
    if len(sys.argv) == 1:
        print(json.dumps(counts()))
        return
    for trace in (traces()[name](FEW) for name in sys.argv[1:]):
        for what in ("launches", "waits", "forbidden"):
            print(f"{what}: {getattr(trace, what).total()}")
            for name, count in getattr(trace, what).most_common():
                print(f"  {count:5d}  {name}")


if __name__ == "__main__":
    main()
