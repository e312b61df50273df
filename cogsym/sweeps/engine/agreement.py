"""The model with all its layers, as a sweep computes it, beside its own forward: whether they are the same model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cogsym.errors import CogsymError
from cogsym.models.attention import AttentionHalf
from cogsym.models.calls import own_logits
from cogsym.models.precision import stream_dtype
from cogsym.sweeps.engine.fallback import FallbackRun
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.prefixes import Batch
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.layers.schedule import schedule
from cogsym.sweeps.layers.trie import Trie

# Nats, root mean square over the tokens, by which two right computations may differ. A residual stream that is rounded
# 2 L times is off by about eps sqrt(2 L), relative; logits of some tens then by 0.1 nats in bfloat16 (eps 2^-7) for the
# deepest models, by an eighth of that in float16, and by 1e-5 in float32, more where a few features
# are a thousand times the others. Arithmetic that is not the model's was off by 0.03 to 30 where it was
# found. Two to ten times what rounding does, so that no model is refused for it.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
_TOKENS = 512  # of the document that are read, at most
_SCORED = 64  # of which the last are compared: all of their logits exist at once


def check_agreement(engine: Engine, head: SweepHead, tokens: tuple[int, ...], document: str) -> None:
    """Compare log-probabilities of a document's tokens under the unablated configuration and the model's own forward.

    The model is called as it is, with whatever hooks its owner has put on it. Layers that are streamed run their own
    forward one at a time.

    Args:
        engine: the layers.
        head: the head.
        tokens: of the document.
        document: what it is called, for the sentence.

    Raises:
        CogsymError: they differ by more than rounding.
    """
    tokens = (tokens if len(tokens) > 1 else tokens * 2)[:_TOKENS]
    first = max(1, len(tokens) - _SCORED)
    device = engine.layers.device
    targets = torch.tensor(tokens[first:], device=device)
    batch = Batch([tokens[:-1]], [(0, i - 1) for i in range(first, len(tokens))])
    trie = Trie([Configuration.of(len(engine.layers.blocks), {})], engine.topology)
    ours: list[Tensor] = []
    engine.run(trie, batch, lambda _, hidden: ours.append(-head.scores(hidden, targets).loss[0]))
    own = _own_logits(engine, batch)
    own = own if own.dtype == torch.float64 else own.float()
    theirs = own.gather(-1, targets[:, None])[:, 0] - own.logsumexp(-1)
    alike = (ours[0] == theirs) | (ours[0].isnan() & theirs.isnan())
    difference = torch.where(alike, 0, ours[0] - theirs).square().mean().sqrt().item()
    dtype = stream_dtype(engine.layers.model)
    bound = ROUNDING.get(dtype, ROUNDING[torch.float32])
    if not difference <= bound:
        raise CogsymError(
            f"The model as this sweep computes it is not the model: on {document} log-probabilities differ from its "
            f"own forward's by {difference:.2g} nats a token, expected at most {bound:g} in "
            f"{str(dtype).removeprefix('torch.')}, so nothing was computed; take off what acts on the model outside "
            "its layers, such as a hook on its decoder, or report it with the model's name."
        )


def _own_logits(engine: Engine, batch: Batch) -> Tensor:
    """Of the scored positions, [P, V]."""
    layers, (sequence,) = engine.layers, batch.sequences
    model, P = layers.model, len(batch.scored)
    if isinstance(layers, ResidentLayers):
        kept = {"logits_to_keep": P} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad(), _soft_cap_kept(engine):
            outcome: Tensor = model(torch.tensor([sequence], device=layers.device), use_cache=False, **kept).logits
        return outcome[0, -P:]
    hidden: list[Tensor] = []
    whole = schedule(Trie([Configuration.of(len(layers.blocks), {})], "whole"), narrow=False)
    with torch.inference_mode(), _soft_cap_kept(engine):
        FallbackRun(layers, whole, batch, lambda _, state: hidden.append(state)).run(lambda number: None)
        return own_logits(model, hidden[0][0])


@contextmanager
def _soft_cap_kept(engine: Engine) -> Iterator[Any]:
    """With the implementation of attention that has the model's soft cap: transformers' default leaves it out."""
    model, block = engine.layers.model, engine.layers.block
    half = None if block is None else block.attention
    if not isinstance(half, AttentionHalf) or half.options.soft_cap is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
