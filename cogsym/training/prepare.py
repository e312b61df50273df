"""Attach the plan and the fast blocks to an ordinary Hugging Face model, and take them off again.

`prepare` sets which parameters need a gradient and gives each known decoder layer an instance attribute `forward`.
Classes, parameters, buffers and `state_dict` keys stay as they are, so everything that works with the model goes on
working; deleting the attribute undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from cogsym.errors import CogsymError
from cogsym.models import Block, UnknownLayerError, read_block
from cogsym.ops import backend
from cogsym.plan import LayerPlan, Part

_RECORD = "_cogsym"
# transformers leaves hooks on attention modules once any output was captured; they act only when asked to.
_CAPTURE_MODULE = "transformers.utils.output_capturing"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Prepared:
    """What `prepare` did to a model, kept on it for `explain` and `restore`."""

    plan: LayerPlan
    requires_grad: dict[str, bool]  # before


def prepare(model: Model, plan: LayerPlan) -> Model:
    """Freeze what `plan` does not train and run the decoder layers on cogsym's kernels.

    Call it after the model is on its device and after peft has added adapters, and before the optimizer is built. In
    a peft model only adapter weights that are trainable already stay so, those of the planned layers.

    Args:
        model: a decoder model from transformers (`AutoModelForCausalLM`), or peft's wrapper around one.
        plan: which parts are trained. A second call replaces the plan of the first.

    Returns:
        The same model, changed in place.

    Raises:
        CogsymError: the model has no decoder layers where transformers keeps them, or does not fit the plan.
    """
    if not hasattr(getattr(model, "get_decoder", lambda: None)(), "layers"):
        raise CogsymError(
            f"{type(model).__name__} has no decoder layers at get_decoder().layers, expected a decoder language model "
            "such as AutoModelForCausalLM gives."
        )
    parts = plan.parts(model)
    if hasattr(model, _RECORD):
        restore(model)
    record = _Prepared(plan, {name: p.requires_grad for name, p in model.named_parameters()})
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
    for layer in _layers(model):
        try:
            block = read_block(layer)
        except UnknownLayerError:
            continue
        layer.__dict__[_RECORD] = block
        # A partial, as a bound method does not survive pickling while its layer is still being rebuilt.
        layer.__dict__["forward"] = partial(_forward, layer)
    setattr(model, _RECORD, record)
    return model


def restore(model: Model) -> Model:
    """Undo `prepare`: the layers run their own forward, `requires_grad` is as it was before.

    Raises:
        CogsymError: the model is not prepared.
    """
    record = _record(model)
    for layer in _layers(model):
        if vars(layer).pop(_RECORD, None) is not None:
            del layer.__dict__["forward"]
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
        reason: why not the fast path; empty where it is.
    """

    index: int
    trained: str
    path: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a few lines, neighbouring layers that are alike in one."""

    summary: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines, start = [self.summary], 0
        for end, report in enumerate(self.layers, 1):
            following = self.layers[end] if end < len(self.layers) else None
            if following and (following.trained, following.path, following.reason) == (
                report.trained,
                report.path,
                report.reason,
            ):
                continue
            span = f"layer {start}" if end - start == 1 else f"layers {start}-{end - 1}"
            lines.append(f"{span}: {report.trained}, {report.path}{f' ({report.reason})' if report.reason else ''}")
            start = end
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Say for each decoder layer whether it is trained, which path it runs, and why not the fast one.

    Raises:
        CogsymError: the model is not prepared.
    """
    plan = _record(model).plan
    parts = {part.name: part for part in plan.parts(model)}
    summary = plan.describe(model)
    if adapters := hasattr(model, "peft_config"):
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
        summary = f"{plan}\ntrained: {counts[0]:,} adapter parameters of {counts[1]:,} ({counts[0] / counts[1]:.1%})"
    reports = []
    for i, layer in enumerate(_layers(model)):
        path, reason = "own forward", _why_not(layer)
        if not reason:
            path = backend.choose(next(layer.parameters()).device)
        reports.append(LayerReport(i, _trained(parts[f"layer {i}"], adapters), path, reason))
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


def _why_not(layer: nn.Module) -> str:
    """Why a layer of a prepared model does not take the fast path, or the empty string."""
    block = vars(layer).get(_RECORD)
    if block is None:
        try:
            read_block(layer)
        except UnknownLayerError as error:
            return str(error)
        return "it was not there when the model was prepared"
    return _hooked(block) or ""


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


def _forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A prepared layer's forward; the signature is that of transformers' decoder layers."""
    block: Block = vars(self)[_RECORD]
    attentions = kwargs.get("output_attentions") or block.attention.config.output_attentions
    if attentions or position_embeddings is None or _hooked(block):
        return type(self).forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    return block.forward(
        hidden_states,
        attention_mask,
        position_embeddings,
        past_key_values,
        position_ids=position_ids,
        use_cache=use_cache,
        **kwargs,
    )
