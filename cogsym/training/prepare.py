"""Attach the plan and the fast blocks to an ordinary Hugging Face model, and take them off again.

`prepare` sets which parameters need a gradient and gives decoder layers and the model with the head an instance
attribute `forward`. Classes, parameters, buffers and `state_dict` keys stay as they are, so everything that works with
the model goes on working; deleting the attributes undoes it. A frozen layer's weights of the same input are laid
beside each other in memory, and have storage of their own again after `restore`.

Wrap the prepared model for several processes as any other. A layer that FSDP2's `fully_shard` shards by itself has its
weights only while it runs or its own gradient is computed, so it cannot be computed again with a run of others and
keeps its input where "nothing" was chosen. A layer sharded before `prepare` runs its own forward.

Under `torch.compile` a frozen layer is traced as a trained one is, on the same operations and in one graph; what is
then kept for the backward pass is the compiler's choice, and `keep` has no say.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from cogsym.errors import CogsymError
from cogsym.models import Block, UnknownLayerError, find_head, read_block
from cogsym.models.heads import Head
from cogsym.models.masks import UnknownMaskError
from cogsym.ops import backend
from cogsym.plan import LayerPlan, Part
from cogsym.training.frozen import Keep, run_frozen
from cogsym.training.memory import Memory, cost

_RECORD = "_cogsym"
# transformers leaves hooks on attention modules once any output was captured; they act only when asked to.
_CAPTURE_MODULE = "transformers.utils.output_capturing"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Prepared:
    """What `prepare` did to a model, kept on it for `explain` and `restore`."""

    plan: LayerPlan
    requires_grad: dict[str, bool]  # before
    memory: Memory
    head: Head | None


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a prepared layer knows of itself; `block` is None where it runs its own forward, for `reason`."""

    block: Block | None
    reason: str
    index: int
    memory: Memory


def prepare(model: Model, plan: LayerPlan, *, keep: str = "auto", memory_budget: int | None = None) -> Model:
    """Freeze what `plan` does not train and run the decoder layers on cogsym's kernels.

    Call it after the model is on its device and after peft has added adapters, and before the optimizer is built. In
    a peft model only adapter weights that are trainable already stay so, those of the planned layers.

    In training mode a call with labels returns the loss without logits, which are then never made; in evaluation mode
    there are logits as ever.

    Args:
        model: a decoder model from transformers (`AutoModelForCausalLM`), or peft's wrapper around one.
        plan: which parts are trained. A second call replaces the plan of the first.
        keep: what a frozen layer through which a gradient flows holds until the backward pass: "all", "attention",
            "input", "offload" or "nothing" (`cogsym.training.frozen`), each less than the one before and repeating
            more; or "auto", the mix that repeats least within `memory_budget`, chosen when a batch of a new shape
            comes.
        memory_budget: bytes for "auto"; half of what is free by default.

    Returns:
        The same model, changed in place.

    Raises:
        CogsymError: the model has no decoder layers where transformers keeps them, or does not fit the plan; or an
            unknown `keep`.
    """
    memory = Memory(keep, memory_budget)
    if not hasattr(getattr(model, "get_decoder", lambda: None)(), "layers"):
        raise CogsymError(
            f"{type(model).__name__} has no decoder layers at get_decoder().layers, expected a decoder language model "
            "such as AutoModelForCausalLM gives."
        )
    parts = plan.parts(model)
    if hasattr(model, _RECORD):
        restore(model)
    head = find_head(model)
    record = _Prepared(plan, {name: p.requires_grad for name, p in model.named_parameters()}, memory, head)
    adapters_only = hasattr(model, "peft_config")
    for part in parts:
        for p in part.parameters:
            p.requires_grad_(part.trained and (p.requires_grad or not adapters_only))
    if not any(p.requires_grad for p in model.parameters()):
        for name, p in model.named_parameters():
            p.requires_grad_(record.requires_grad[name])
        raise CogsymError(
            f"The plan ({plan}) leaves no parameter to train; with peft, give the adapter the plan's layers "
            "(layers_to_transform)."
        )
    for i, layer in enumerate(_layers(model)):
        if "forward" in vars(layer):
            continue  # another library's
        block, reason = None, "it was sharded before the model was prepared"
        if not isinstance(layer, FSDPModule):
            try:
                block, reason = read_block(layer), ""
            except UnknownLayerError as error:
                reason = str(error)
        layer.__dict__[_RECORD] = _Layer(block, reason, i, memory)
        # A partial, as a bound method does not survive pickling while its layer is still being rebuilt.
        layer.__dict__["forward"] = partial(_forward, layer)
        if block is not None and _frozen_path(layer, block):
            memory.blocks[i] = block
            for projections in block.projections():
                projections.join()
    if head is not None:
        forward = partial(_forward_with_loss, head)
        # transformers reads off the signature which columns of a dataset the model takes.
        forward.__signature__ = inspect.signature(head.model.forward)  # type: ignore[attr-defined]
        head.model.__dict__["forward"] = forward
    setattr(model, _RECORD, record)
    return model


def restore(model: Model) -> Model:
    """Undo `prepare`: the layers run their own forward, `requires_grad` is as it was before.

    Raises:
        CogsymError: the model is not prepared.
    """
    record = _record(model)
    for layer in _layers(model):
        known: _Layer | None = vars(layer).pop(_RECORD, None)
        if known is not None:
            del layer.__dict__["forward"]
            for projections in known.block.projections() if known.block else ():
                if projections.plain():
                    projections.part()
    if record.head is not None:
        del record.head.model.__dict__["forward"]
    for name, p in model.named_parameters():
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(model, _RECORD)
    return model


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
    plan = _record(model).plan
    parts = {part.name: part for part in plan.parts(model)}
    summary = plan.describe(model)
    if adapters := hasattr(model, "peft_config"):
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
        summary = f"{plan}\ntrained: {counts[0]:,} adapter parameters of {counts[1]:,} ({counts[0] / counts[1]:.1%})"
    reports: list[LayerReport] = []
    gradient_below = any(p.requires_grad for p in parts["embeddings"].parameters)
    for i, layer in enumerate(_layers(model)):
        report = LayerReport(i, _trained(parts[f"layer {i}"], adapters), "own forward", _why_not(layer))
        if not report.reason:
            foreign = vars(layer)[_RECORD].block.foreign_attention(training=True)
            reason = f"but the model's own attention: {foreign}" if foreign else ""
            report = replace(report, path=backend.choose(next(layer.parameters()).device), reason=reason)
            report = _with_memory(report, layer, _record(model).memory, gradient_below)
        reports.append(report)
        gradient_below |= report.trained != "frozen"
    return Explanation(summary, tuple(reports))


def _record(model: nn.Module) -> _Prepared:
    record = getattr(model, _RECORD, None)
    if record is None:
        raise CogsymError(f"This {type(model).__name__} is not prepared; call cogsym.prepare(model, plan) first.")
    return record


def _layers(model: Any) -> nn.ModuleList:
    return model.get_decoder().layers


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
    keep = _possible(layer, chosen)
    first = keep != "nothing" or report.index - 1 not in memory.blocks
    length = memory.shape[1] if memory.shape else 1
    it = cost(block, keep, length, block.down.modules[0].weight.element_size(), first)
    repeated = it.repeated / (it.flops - it.repeated)
    reason = "" if keep == chosen else f"not {chosen}: it is sharded by itself"
    return replace(report, keep=keep, keep_reason=reason, bytes_per_token=it.bytes_per_token, repeated=repeated)


def _possible(layer: nn.Module, keep: Keep) -> Keep:
    """What a layer keeps where `keep` was chosen."""
    return "input" if keep == "nothing" and isinstance(layer, FSDPModule) else keep


def _why_not(layer: nn.Module) -> str:
    """Why a layer of a prepared model does not take the fast path, or the empty string."""
    known: _Layer | None = vars(layer).get(_RECORD)
    if known is None:
        try:
            read_block(layer)
        except UnknownLayerError as error:
            return str(error)
        return "it was not there when the model was prepared"
    if known.block is not None and (hooked := _hooked(known.block)):
        return hooked
    if known.block is not None and _frozen_path(layer, known.block):
        reason = known.block.foreign_attention(training=True)
    else:
        reason = known.reason
    checkpointed = reason and known.memory.keep != "all" and not _any_trained(layer)
    return f"{reason or ''}{'; checkpointed' if checkpointed else ''}"


def _hooked(block: Block) -> str | None:
    """A hook that the fast path would leave out, or None."""
    for module in block.bypassed():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for hook in hooks.values():
                if getattr(hook, "__module__", None) != _CAPTURE_MODULE:
                    return f"a hook on {type(module).__name__} must fire"
    return None


def _any_trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())


def _frozen_path(layer: nn.Module, block: Block) -> bool:
    """Whether nothing in the layer is trained and its weights can be used without calling its modules."""
    return not _any_trained(layer) and all(projections.plain() for projections in block.projections())


def _forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A prepared layer's forward; the signature is that of transformers' decoder layers."""
    known: _Layer = vars(self)[_RECORD]
    block, x = known.block, hidden_states
    own = partial(
        type(self).forward,
        self,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    if block is None:
        return _run_own(self, own, x, past_key_values, known.memory)
    attentions = kwargs.get("output_attentions") or block.attention.config.output_attentions
    if attentions or position_embeddings is None or _hooked(block):
        return own(x)
    by_hand = past_key_values is None and not torch.compiler.is_compiling()
    if by_hand and _frozen_path(self, block) and not _projection_hooks(block):
        try:
            positions = block.positions(position_embeddings, attention_mask, x, self.training)
        except UnknownMaskError:
            return _run_own(self, own, x, past_key_values, known.memory)
        keep = known.memory.of(known.index, x, block.down.modules[0].weight.element_size())
        return run_frozen(block, x, positions, _possible(self, keep))
    return block.forward(
        x,
        attention_mask,
        position_embeddings,
        past_key_values,
        position_ids=position_ids,
        use_cache=use_cache,
        **kwargs,
    )


def _run_own(layer: nn.Module, own: Any, x: Tensor, past_key_values: Any | None, memory: Memory) -> Any:
    """The layer's own forward; a frozen layer's activations are computed again rather than kept."""
    if memory.keep == "all" or past_key_values is not None or not x.requires_grad or _any_trained(layer):
        return own(x)
    return checkpoint(own, x, use_reentrant=False)


def _projection_hooks(block: Block) -> bool:
    """Whether a hook waits on a linear module, which the frozen path does not call."""
    modules = [module for projections in block.projections() for module in projections.modules]
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


def _forward_with_loss(head: Head, *args: Any, **kwargs: Any) -> Any:
    """A prepared model's forward: without logits where only the loss is wanted."""
    labels = kwargs.pop("labels", None)
    if len(args) > 1 or not head.serves(labels, kwargs):
        return type(head.model).forward(head.model, *args, labels=labels, **kwargs)
    return head.forward(labels, **dict(zip(("input_ids",), args, strict=False)), **kwargs)
