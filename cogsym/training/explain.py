"""Say how each layer of a prepared model and its head run, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from cogsym import ops
from cogsym.decoder import layers_of
from cogsym.models import UnknownLayerError, read_block
from cogsym.models.attachment import attached, attachment
from cogsym.models.attention import AttentionHalf
from cogsym.models.int8 import int8_modules
from cogsym.models.paths import OWN, by_spans, half_path, in_one_word, norm_reasons, routes
from cogsym.models.precision import computed_dtype
from cogsym.plan import Part
from cogsym.training.keep import Memory, cost
from cogsym.training.layer import How, PreparedLayer, possible, why_whole
from cogsym.training.prepare import forward_with_loss, layer_forward, record_of


@dataclass(frozen=True)
class LayerReport:
    """How one decoder layer runs.

    Attributes:
        index: 0 next to the embeddings.
        trained: "trained", "frozen", "partly trained" or "adapters trained".
        attention: the backend of the attention half ("cpp", "triton", "reference"), or "own forward".
        mlp: that of the MLP half.
        reason: why not the fast path, or what in it is not; empty where all is.
        keep: what a frozen layer of the fast path keeps of batches like the last one; empty where nothing is frozen,
            where no gradient flows through it, or before "auto" has seen a batch.
        keep_reason: why not "nothing", where that was chosen; empty elsewhere.
        bytes_per_token: what it then holds for the backward pass.
        repeated: the part of its arithmetic, forward and input gradient, that it does twice.
        on_disk: its weights are read as it computes.
    """

    index: int
    trained: str
    attention: str
    mlp: str
    reason: str
    keep: str = ""
    keep_reason: str = ""
    bytes_per_token: int = 0
    repeated: float = 0.0
    on_disk: bool = False

    @property
    def path(self) -> str:
        """Both halves' path in one word where they have the same."""
        return in_one_word(self.attention, self.mlp)

    def __str__(self) -> str:
        trained = f"{self.trained}{' and on disk' if self.on_disk else ''}"
        line = f"{trained}, {self.path}{f' ({self.reason})' if self.reason else ''}"
        if self.keep:
            keeps = f"{self.keep}{f' ({self.keep_reason})' if self.keep_reason else ''}"
            line += f", keeps {keeps}: {self.bytes_per_token:,} bytes a token, {self.repeated:.0%} repeated"
        return line


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a few lines, neighbouring layers that are alike in one.

    Attributes:
        summary: what needs a gradient now.
        layers: the decoder layers.
        head: how the loss is computed in training.
    """

    summary: str
    layers: tuple[LayerReport, ...]
    head: str

    def __str__(self) -> str:
        return "\n".join([self.summary, *by_spans([str(report) for report in self.layers]), f"head: {self.head}"])


def explain(model: nn.Module) -> Explanation:
    """Say for each decoder layer whether it is trained, which path it runs in training, and why not the fast one.

    Raises:
        CogsymError: the model is not prepared.
    """
    record = record_of(model)
    plan = record.plan
    parts = {part.name: part for part in plan.parts(model)}
    adapters = hasattr(model, "peft_config")
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
    summary = plan.describe(model)
    if adapters:
        summary = f"{plan}\ntrained: {counts[0]:,} adapter parameters of {counts[1]:,} ({counts[0] / counts[1]:.1%})"
    elif any(p.requires_grad is not part.trained for part in parts.values() for p in part.parameters):
        summary += f"\nchanged since: {counts[0]:,} of {counts[1]:,} parameters need a gradient now"
    if quantised := int8_modules(model):
        summary += (
            f"\nfrozen weights: {len(quantised):,} linear maps in int8, "
            f"{sum(m.weight.nbytes for m in quantised) / 1e6:,.1f} MB"
        )
    reports: list[LayerReport] = []
    here = next(p.device for p in parts["embeddings"].parameters)  # and where layers on disk compute
    gradient_below = any(p.requires_grad for p in parts["embeddings"].parameters)
    for i, layer in enumerate(layers_of(model)):
        report = _report(i, layer, _trained(parts[f"layer {i}"], adapters), here)
        reports.append(_with_memory(report, layer, record.memory, gradient_below))
        gradient_below |= report.trained != "frozen"
    return Explanation(summary, tuple(reports), _head(model))


def _head(model: nn.Module) -> str:
    record = record_of(model)
    head = record.head
    if record.logits:
        return "logits by its own forward (prepare was asked for them)"
    if head is None:
        return f"logits by its own forward ({type(model).__name__} is not a model whose head is known to cogsym)"
    reason = head.why_logits()
    if not attached(head.model, forward_with_loss):
        reason = "another library has replaced the model's forward"
    if reason:
        return f"logits by its own forward ({reason})"
    device, dtype = head.model.lm_head.weight.device, computed_dtype(head.model.lm_head)
    route = ops.route("linear_cross_entropy", device, dtype)
    return f"loss without logits, {route.backend}{f' ({route.reason})' if route.reason else ''}"


def _trained(part: Part, adapters: bool) -> str:
    needed = {p.requires_grad for p in part.parameters}
    if len(needed) == 2:
        return "adapters trained" if adapters else "partly trained"
    return "trained" if needed == {True} else "frozen"


def _report(index: int, layer: nn.Module, trained: str, here: torch.device) -> LayerReport:
    """How a layer runs, without what it keeps."""

    def own(reason: str, how: How | None = None) -> LayerReport:
        checkpointed = how is not None and not how.trained and known is not None and known.memory.keep != "all"
        return LayerReport(index, trained, OWN, OWN, f"{reason}{'; checkpointed' if checkpointed else ''}")

    known: PreparedLayer | None = attachment(layer)
    if known is None:
        try:
            read_block(layer)
        except UnknownLayerError as error:
            return own(str(error))
        return own("it was not there when the model was prepared")
    if not attached(layer, layer_forward):
        return own("another library has replaced the layer's forward")
    how = known.read(layer)
    if how.block is None:
        return own(how.reason, how)
    if how.block.dropout:
        return own(f"it drops out {how.block.dropout:.0%} of what it adds to the stream", how)
    block, reasons = how.block, []
    foreign = block.attention.foreign(training=True) if isinstance(block.attention, AttentionHalf) else None
    if foreign and how.frozen:
        block = known.with_own_attention(foreign)
    elif foreign:
        reasons.append(f"but the model's own attention: {foreign}")
    if how.frozen and (reason := why_whole(block, {}, training=True)):
        return own(foreign or reason, how)
    found = routes(block, here if known.streamed else next(layer.parameters()).device, computed_dtype(layer))
    attention, mlp = map(half_path, found)
    reasons += [
        f"{name} on {route.backend}: {route.reason}" for each in found for name, route in each.items() if route.reason
    ]
    sharded = any(isinstance(p, DTensor) for p in layer.parameters())  # whole again while the layer runs
    if not (how.trained or how.frozen or sharded):
        reasons.append("its projections are called as modules: it keeps what autograd keeps")
    again = "; checkpointed" if how.frozen else ""
    reasons += [f"{half.reason}{again}" for half in block.halves if half.reason]
    reasons += norm_reasons(block)
    return LayerReport(index, trained, attention, mlp, "; ".join(reasons), on_disk=known.streamed is not None)


def _with_memory(report: LayerReport, layer: nn.Module, memory: Memory, gradient_below: bool) -> LayerReport:
    """The report with what the layer keeps, where a gradient flows through it."""
    chosen, block = memory.last(report.index), memory.blocks.get(report.index)
    if chosen is None or block is None or report.trained != "frozen" or report.path == OWN or not gradient_below:
        return report
    keep = possible(layer, chosen)
    first = keep != "nothing" or report.index - 1 not in memory.blocks
    length = memory.shape[1] if memory.shape else 1
    element = computed_dtype(layer).itemsize
    products, stream = memory.sizes or (element, element)
    it = cost(block, keep, length, products, first, stream)
    repeated = it.repeated / max(it.flops - it.repeated, 1)
    reason = "" if keep == chosen else f"not {chosen}: it is sharded by itself"
    return replace(report, keep=keep, keep_reason=reason, bytes_per_token=it.bytes_per_token, repeated=repeated)
