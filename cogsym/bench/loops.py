"""Whom sweeps are compared with: loops over layer configurations, one after the other.

A loop asks a model without the layers in question, as a user would write it. There are three ways to such a model: keep
only the other layers, compute all and let hooks discard, and TransformerLens's own hooks. All share the weights of one
model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogsym.bench.competitor import Competitor
from cogsym.sweeps.engine.requests import Generate, Score
from cogsym.sweeps.layers.configurations import Configuration


@dataclass(frozen=True)
class LoopOptions:
    """What a loop may choose.

    Attributes:
        attention: implementation of transformers.
        batch: sequences at a time.
        all_logits: take the model's logits at every position, or the head at those scored alone.
    """

    attention: str
    batch: int
    all_logits: bool = False


@dataclass
class Probe:
    """A model that is asked.

    Attributes:
        model: from transformers, in evaluation mode.
        bridge: what TransformerLens made of it, kept while others take their turns.
    """

    model: Any
    bridge: Any = None


class Loop(Protocol):
    """A way to ask a model without some of its layers."""

    def use_attention(self, implementation: str) -> None:
        """Take this implementation of attention."""

    def skipping(self, configuration: Configuration) -> AbstractContextManager[None]:
        """While it lasts, the layers that a configuration skips do nothing."""

    def logits(self, ids: Tensor, wanted: Tensor, all_logits: bool) -> Tensor:
        """Those after the `wanted` positions, [n, V], of right-padded ids, [B, T]."""

    def generate(self, ids: Tensor, number: int) -> Tensor:
        """The most likely `number` tokens one after the other, [B, number], behind prompts of one length, [B, T]."""


class _Transformers:
    """A model of transformers."""

    def __init__(self, model: Any, skipping: Callable[[Any, Configuration], AbstractContextManager[None]]) -> None:
        self._model, self._skipping = model, skipping

    def use_attention(self, implementation: str) -> None:
        self._model.set_attn_implementation(implementation)

    def skipping(self, configuration: Configuration) -> AbstractContextManager[None]:
        return self._skipping(self._model, configuration)

    def logits(self, ids: Tensor, wanted: Tensor, all_logits: bool) -> Tensor:
        # No mask: what is padded on the right is seen by nobody who is asked.
        if all_logits:
            every: Tensor = self._model(input_ids=ids, use_cache=False).logits
            return every[wanted]
        hidden = self._model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits: Tensor = self._model.lm_head(hidden[wanted])
        return logits

    def generate(self, ids: Tensor, number: int) -> Tensor:
        written: Tensor = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=number,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return written[:, ids.shape[1] :]


class _TransformerLens:
    """A bridge of TransformerLens."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge

    def use_attention(self, implementation: str) -> None:
        self._bridge.original_model.set_attn_implementation(implementation)

    def skipping(self, configuration: Configuration) -> AbstractContextManager[None]:
        before: dict[int, Tensor] = {}

        def keep(state: Tensor, hook: Any) -> None:
            before[hook.layer()] = state

        def put_back(state: Tensor, hook: Any) -> Tensor:
            return before.pop(hook.layer())

        hooks = [
            (f"blocks.{i}.hook_resid_{at}", hook)
            for i in configuration.changed
            for at, hook in (("pre", keep), ("post", put_back))
        ]
        entered: AbstractContextManager[None] = self._bridge.hooks(fwd_hooks=hooks)
        return entered

    def logits(self, ids: Tensor, wanted: Tensor, all_logits: bool) -> Tensor:
        every: Tensor = self._bridge(ids)
        return every[wanted]

    def generate(self, ids: Tensor, number: int) -> Tensor:
        written: Tensor = self._bridge.generate(
            ids, max_new_tokens=number, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
        )
        return written[:, ids.shape[1] :]


@contextmanager
def sliced(model: Any, configuration: Configuration) -> Iterator[None]:
    """The model has only the layers that a configuration keeps."""
    decoder, config, every = model.model, model.config, model.model.layers
    kept = [i for i, action in enumerate(configuration.actions) if action == "keep"]
    types = getattr(config, "layer_types", None)
    decoder.layers, config.num_hidden_layers = nn.ModuleList(every[i] for i in kept), len(kept)
    if types is not None:
        config.layer_types = [types[i] for i in kept]
    for place, i in enumerate(kept):
        every[i].self_attn.layer_idx = place  # where the cache keeps its keys
    try:
        yield
    finally:
        decoder.layers, config.num_hidden_layers = every, len(every)
        if types is not None:
            config.layer_types = types
        for i, layer in enumerate(every):
            layer.self_attn.layer_idx = i


@contextmanager
def hooked(model: Any, configuration: Configuration) -> Iterator[None]:
    """Layers that a configuration skips are computed, and what they say is discarded."""

    def discard(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0]

    with ExitStack() as stack:
        for i in configuration.changed:
            handle = model.model.layers[i].register_forward_hook(discard)
            stack.callback(handle.remove)
        yield


def _transformers(skipping: Callable[..., AbstractContextManager[None]]) -> Callable[[Probe], Any]:
    @contextmanager
    def applied(probe: Probe) -> Iterator[Loop]:
        before = probe.model.config._attn_implementation
        try:
            yield _Transformers(probe.model, skipping)
        finally:
            probe.model.set_attn_implementation(before)

    return applied


@contextmanager
def _transformer_lens(probe: Probe) -> Iterator[Loop]:
    """It replaces a model's modules, so it gets a model of its own around the same weights."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if probe.bridge is None:
        shared = {id(t): t for t in (*probe.model.parameters(), *probe.model.buffers())}
        twin = copy.deepcopy(probe.model, shared)
        probe.bridge = build_bridge_from_module(
            twin, type(twin).__name__, hf_config=twin.config, dtype=twin.dtype, device=twin.device
        )
    yield _TransformerLens(probe.bridge)


_SLOWER = "it computes every layer, and is slower than the loop over kept layers: --full"
LOOPS: tuple[Competitor[Probe, Loop], ...] = (
    Competitor("loop, kept layers", _transformers(sliced)),
    Competitor("loop, hooks discard", _transformers(hooked), full=_SLOWER),
    Competitor("TransformerLens", _transformer_lens, needs="transformer_lens", full=_SLOWER),
)


@torch.inference_mode()
def likelihoods(
    loop: Loop, configuration: Configuration, settings: LoopOptions, requests: Sequence[Score], device: torch.device
) -> list[float]:
    """The log-likelihood of each continuation, by right-padded batches of requests of like length."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    result = [0.0] * len(requests)
    loop.use_attention(settings.attention)
    with loop.skipping(configuration):
        for begin in range(0, len(order), settings.batch):
            group = [requests[i] for i in order[begin : begin + settings.batch]]
            longest = max(len(request.tokens) for request in group) - 1  # after the last nothing is asked
            ids = torch.zeros(len(group), longest, dtype=torch.int64)
            wanted = torch.zeros_like(ids, dtype=torch.bool)
            for row, request in enumerate(group):
                ids[row, : len(request.tokens) - 1] = torch.tensor(request.tokens[:-1])
                wanted[row, request.first - 1 : len(request.tokens) - 1] = True
            targets = torch.tensor([token for request in group for token in request.tokens[request.first :]])
            logits = loop.logits(ids.to(device), wanted.to(device), settings.all_logits)
            losses = torch.zeros(wanted.shape)
            losses[wanted] = F.cross_entropy(logits.float(), targets.to(device), reduction="none").cpu()
            for i, loss in zip(order[begin:], losses.double().sum(1).tolist(), strict=False):
                result[i] = -loss
    return result


@torch.inference_mode()
def texts(
    loop: Loop, configuration: Configuration, settings: LoopOptions, prompts: Sequence[Generate], device: torch.device
) -> list[list[int]]:
    """The tokens that follow each prompt; prompts and answers have one length."""
    result: list[list[int]] = []
    loop.use_attention(settings.attention)
    with loop.skipping(configuration):
        for begin in range(0, len(prompts), settings.batch):
            group = prompts[begin : begin + settings.batch]
            ids = torch.tensor([prompt.tokens for prompt in group], device=device)
            result += loop.generate(ids, group[0].max_new_tokens).tolist()
    return result
