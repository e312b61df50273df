"""Say how each layer of a prepared model runs, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from cogsym import ops
from cogsym.models import UnknownLayerError, read_block
from cogsym.plan import Part
from cogsym.training.memory import Memory, cost
from cogsym.training.prepare import any_trained, hooked, layers_of, possible, record_of, runs_frozen, state_of


@dataclass(frozen=True)
class LayerReport:
    """How one decoder layer runs.

    Attributes:
        index: 0 next to the embeddings.
        trained: "trained", "frozen", "partly trained" or "adapters trained".
        path: the backend of the fast path ("cpp", "triton", "reference"), or "own forward".
        reason: why not the fast path, or what in it is not; empty where all is.
        keep: what a frozen layer of the fast path keeps of batches like the last one; empty where nothing is frozen,
            where no gradient flows through it, or before "auto" has seen a batch.
        keep_reason: why not "nothing", where that was chosen; empty elsewhere.
        bytes_per_token: what it then holds for the backward pass.
        repeated: the part of its arithmetic, forward and input gradient, that it does twice.
    """

    index: int
    trained: str
    path: str
    reason: str
    keep: str = ""
    keep_reason: str = ""
    bytes_per_token: int = 0
    repeated: float = 0.0


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a few lines, neighbouring layers that are alike in one."""

    summary: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines, start = [self.summary], 0
        for end, report in enumerate(self.layers, 1):
            if end < len(self.layers) and replace(self.layers[end], index=0) == replace(report, index=0):
                continue
            span = f"layer {start}" if end - start == 1 else f"layers {start}-{end - 1}"
            line = f"{span}: {report.trained}, {report.path}{f' ({report.reason})' if report.reason else ''}"
            if report.keep:
                keeps = f"{report.keep}{f' ({report.keep_reason})' if report.keep_reason else ''}"
                line += f", keeps {keeps}: {report.bytes_per_token:,} bytes a token, {report.repeated:.0%} repeated"
            lines.append(line)
            start = end
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Say for each decoder layer whether it is trained, which path it runs in training, and why not the fast one.

    Raises:
        CogsymError: the model is not prepared.
    """
    plan = record_of(model).plan
    parts = {part.name: part for part in plan.parts(model)}
    summary = plan.describe(model)
    if adapters := hasattr(model, "peft_config"):
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
        summary = f"{plan}\ntrained: {counts[0]:,} adapter parameters of {counts[1]:,} ({counts[0] / counts[1]:.1%})"
    reports: list[LayerReport] = []
    gradient_below = any(p.requires_grad for p in parts["embeddings"].parameters)
    for i, layer in enumerate(layers_of(model)):
        report = LayerReport(i, _trained(parts[f"layer {i}"], adapters), "own forward", _why_not(layer))
        state = state_of(layer)
        if not report.reason and state is not None and state.block is not None:
            foreign = state.block.foreign_attention(training=True)
            reason = f"but the model's own attention: {foreign}" if foreign else ""
            parameter = next(layer.parameters())
            route = ops.route("rms_norm", parameter.device, parameter.dtype)
            report = replace(report, path=route.backend, reason=reason)
            report = _with_memory(report, layer, record_of(model).memory, gradient_below)
        reports.append(report)
        gradient_below |= report.trained != "frozen"
    return Explanation(summary, tuple(reports))


def _trained(part: Part, adapters: bool) -> str:
    needed = {p.requires_grad for p in part.parameters}
    if len(needed) == 2:
        return "adapters trained" if adapters else "partly trained"
    return "trained" if needed == {True} else "frozen"


def _with_memory(report: LayerReport, layer: nn.Module, memory: Memory, gradient_below: bool) -> LayerReport:
    """The report with what the layer keeps, where a gradient flows through it."""
    chosen, block = memory.last(report.index), memory.blocks.get(report.index)
    if chosen is None or block is None or report.trained != "frozen" or not gradient_below:
        return report
    keep = possible(layer, chosen)
    first = keep != "nothing" or report.index - 1 not in memory.blocks
    length = memory.shape[1] if memory.shape else 1
    it = cost(block, keep, length, block.down.modules[0].weight.element_size(), first)
    repeated = it.repeated / (it.flops - it.repeated)
    reason = "" if keep == chosen else f"not {chosen}: it is sharded by itself"
    return replace(report, keep=keep, keep_reason=reason, bytes_per_token=it.bytes_per_token, repeated=repeated)


def _why_not(layer: nn.Module) -> str:
    """Why a layer of a prepared model does not take the fast path, or the empty string."""
    known = state_of(layer)
    if known is None:
        try:
            read_block(layer)
        except UnknownLayerError as error:
            return str(error)
        return "it was not there when the model was prepared"
    if known.block is not None and (hook := hooked(known.block)):
        return hook
    if known.block is not None and runs_frozen(layer, known.block):
        reason = known.block.foreign_attention(training=True)
    else:
        reason = known.reason
    checkpointed = reason and known.memory.keep != "all" and not any_trained(layer)
    return f"{reason or ''}{'; checkpointed' if checkpointed else ''}"
