"""Whom training is compared with: each a way to get the loss of the same model, that leaves no trace on it.

All share one model and its weights, so that the largest fits the device once and a verification compares like with
like. A competitor is applied to transformers' plain model with the same parameters frozen, and leaves it so.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

import cogsym
from cogsym.bench.case import OURS
from cogsym.bench.competitor import Competitor

Loss = Callable[[], Tensor]


@dataclass
class Job:
    """What is trained.

    Attributes:
        model: from transformers, frozen as `plan` says; with peft's adapters in it where `adapters`.
        plan: which layers are trained.
        inputs: input_ids and labels.
        autocast: enters the precision of the computation.
        adapters: LoRA is trained, not the layers' own weights.
        compiled: what torch.compile made of the model, by its budget, kept while others take their turns.
    """

    model: Any
    plan: cogsym.LayerPlan
    inputs: dict[str, Tensor]
    autocast: Callable[[], AbstractContextManager[object]]
    adapters: bool
    compiled: dict[float, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        return self.inputs["input_ids"].device

    def call(self, model: Any | None = None) -> Loss:
        """The loss as a model with labels returns it."""
        called = self.model if model is None else model

        def loss() -> Tensor:
            with self.autocast():
                return called(**self.inputs, use_cache=False).loss

        return loss

    def with_head(self, head: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        """The loss from the last hidden states and the head's weight."""
        base = self.model.get_base_model() if self.adapters else self.model

        def loss() -> Tensor:
            with self.autocast():
                hidden = base.model(input_ids=self.inputs["input_ids"], use_cache=False).last_hidden_state
                return head(hidden, base.lm_head.weight)

        return loss


def _ours(keep: str) -> Callable[[Job], AbstractContextManager[Loss]]:
    @contextlib.contextmanager
    def applied(job: Job) -> Iterator[Loss]:
        with prepared(job.model, job.plan, keep):
            yield job.call()

    return applied


@contextlib.contextmanager
def prepared(model: Any, plan: cogsym.LayerPlan, keep: str) -> Iterator[None]:
    """The model is prepared while this lasts."""
    cogsym.prepare(model, plan, keep=keep)
    try:
        yield
    finally:
        cogsym.restore(model)


def _attention(implementation: str) -> Callable[[Job], AbstractContextManager[Loss]]:
    @contextlib.contextmanager
    def applied(job: Job) -> Iterator[Loss]:
        before = job.model.config._attn_implementation
        job.model.set_attn_implementation(implementation)
        try:
            yield job.call()
        finally:
            job.model.set_attn_implementation(before)

    return applied


@contextlib.contextmanager
def _attributes_restored(model: Any) -> Iterator[None]:
    """What is set on modules inside is gone afterwards."""
    modules = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, before in modules:
            vars(module).clear()
            vars(module).update(before)


@contextlib.contextmanager
def _checkpointed(job: Job) -> Iterator[Loss]:
    with _attributes_restored(job.model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in the oldest transformers that is served
        job.model.gradient_checkpointing_enable({"use_reentrant": False})
        # It makes the embeddings' output need a gradient, which only reentrant checkpointing wants, and would leave it.
        job.model.disable_input_require_grads()
        yield job.call()


def _compiled(budget: float) -> Callable[[Job], AbstractContextManager[Loss]]:
    """torch.compile that may keep so much of the activations, 1 all of them, and computes the others again."""

    def backend(graph: Any, inputs: Any) -> Any:  # one for each: dynamo shares what equal backends have compiled
        from torch._inductor.compile_fx import compile_fx  # takes long to import

        with functorch_config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    @contextlib.contextmanager
    def applied(job: Job) -> Iterator[Loss]:
        if budget not in job.compiled:
            job.compiled[budget] = torch.compile(job.model, dynamic=False, backend=backend)
        yield job.call(job.compiled[budget])

    return applied


@contextlib.contextmanager
def _cut_cross_entropy(job: Job) -> Iterator[Loss]:
    """Its Triton kernels on a GPU, its compiled form elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if job.device.type == "cuda" else "torch_compile"

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = linear_cross_entropy(
            hidden.to(weight.dtype), weight, job.inputs["labels"], shift=True, impl=implementation
        )
        return loss

    yield job.with_head(head)


@contextlib.contextmanager
def _quack(job: Job) -> Iterator[Loss]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).to(weight.dtype)
        loss: Tensor = chunked_linear_cross_entropy(rows, weight, job.inputs["labels"][:, 1:].reshape(-1))
        return loss

    yield job.with_head(head)


@contextlib.contextmanager
def _liger(job: Job) -> Iterator[Loss]:
    """Liger patches a model's modules, and its family's rotary embedding for everybody: both are taken back."""
    import liger_kernel.transformers as liger

    base = job.model.get_base_model() if job.adapters else job.model
    modeling = sys.modules[type(base).__module__]
    names = dict(vars(modeling))
    try:
        with _attributes_restored(base):
            getattr(liger, f"apply_liger_kernel_to_{base.config.model_type}")(model=base)
            yield job.call()
    finally:
        vars(modeling).update(names)


@contextlib.contextmanager
def _unusable(job: Job) -> Iterator[Loss]:
    raise RuntimeError("not meant to run")
    yield


COMPETITORS: tuple[Competitor[Job, Loss], ...] = (
    Competitor(OURS, _ours("auto")),
    Competitor(f"{OURS}, keeps nothing", _ours("nothing"), full="a second setting of ours: --full"),
    Competitor("transformers, eager", _attention("eager")),
    Competitor("transformers, SDPA", _attention("sdpa")),
    Competitor("transformers, checkpointing", _checkpointed),
    Competitor("torch.compile", _compiled(1.0), full="compiling takes minutes: --full"),
    Competitor("torch.compile, half its budget", _compiled(0.5), full="compiling takes minutes: --full"),
    Competitor("cut-cross-entropy", _cut_cross_entropy, needs="cut_cross_entropy"),
    Competitor("Liger-Kernel", _liger, needs="liger_kernel", gpu=True),
    Competitor("quack", _quack, needs="quack", gpu=True),
    Competitor("FlashAttention", _attention("flash_attention_2"), needs="flash_attn", gpu=True),
    Competitor(
        "Unsloth", _unusable, needs="unsloth", gpu=True,
        refused="importing it patches transformers for the whole process, which would change the others",
    ),
)  # fmt: skip
