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
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from cogsym.errors import CogsymError
from cogsym.models import Block, UnknownLayerError, find_head, read_block
from cogsym.models.heads import Head
from cogsym.models.masks import UnknownMaskError
from cogsym.plan import LayerPlan
from cogsym.training.frozen import Keep, run_frozen
from cogsym.training.memory import Memory

RECORD = "_cogsym"  # the attribute of a prepared model, and of each of its layers, that says what was done to it
# transformers leaves hooks on attention modules once any output was captured; they act only when asked to.
_CAPTURE_MODULE = "transformers.utils.output_capturing"
# Newer releases checkpoint in the class's forward, which a prepared layer does not call; older ones around the call.
_CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Prepared:
    """What `prepare` did to a model, kept on it for `explain` and `restore`."""

    plan: LayerPlan
    requires_grad: dict[str, bool]  # before
    memory: Memory
    models: tuple[nn.Module, ...]  # with a forward of ours, besides the layers


@dataclass(frozen=True, eq=False)
class PreparedLayer:
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
    there are logits as ever. A training step has no cache unless `use_cache=True` asks for one, and then frozen layers
    keep what trained ones do. Where transformers' gradient checkpointing is on, trained layers follow it; frozen ones
    keep what `keep` says (older releases checkpoint around a layer's call, and both follow it).

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
    if hasattr(model, RECORD):
        restore(model)
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    adapters_only = hasattr(model, "peft_config")
    for part in parts:
        for p in part.parameters:
            p.requires_grad_(part.trained and (p.requires_grad or not adapters_only))
    if not any(p.requires_grad for p in model.parameters()):
        for name, p in model.named_parameters():
            p.requires_grad_(requires_grad[name])
        raise CogsymError(
            f"The plan ({plan}) leaves no parameter to train; with peft, give the adapter the plan's layers "
            "(layers_to_transform)."
        )
    for i, layer in enumerate(layers_of(model)):
        if "forward" in vars(layer):
            continue  # another library's
        block, reason = None, "it was sharded before the model was prepared"
        if not isinstance(layer, FSDPModule):
            try:
                block, reason = read_block(layer), ""
            except UnknownLayerError as error:
                reason = str(error)
        layer.__dict__[RECORD] = PreparedLayer(block, reason, i, memory)
        # A partial, as a bound method does not survive pickling while its layer is still being rebuilt.
        layer.__dict__["forward"] = partial(_forward, layer)
        if block is not None and runs_frozen(layer, block):
            memory.blocks[i] = block
            for projections in block.projections():
                projections.join()
    forwards: list[tuple[Any, Any]] = []
    if "forward" not in vars(decoder := model.get_decoder()):  # type: ignore[operator]
        forwards.append((decoder, partial(_decoder_forward, decoder)))
    if head := find_head(model):
        forwards.append((head.model, partial(_forward_with_loss, head)))
    for module, forward in forwards:
        # transformers reads off the signature which columns of a dataset the model takes.
        forward.__signature__ = inspect.signature(module.forward)
        module.__dict__["forward"] = forward
    record = _Prepared(plan, requires_grad, memory, tuple(module for module, _ in forwards))
    setattr(model, RECORD, record)
    return model


def restore(model: Model) -> Model:
    """Undo `prepare`: the layers run their own forward, `requires_grad` is as it was before.

    Raises:
        CogsymError: the model is not prepared.
    """
    record = record_of(model)
    for layer in layers_of(model):
        known: PreparedLayer | None = vars(layer).pop(RECORD, None)
        if known is not None:
            del layer.__dict__["forward"]
            for projections in known.block.projections() if known.block else ():
                if projections.plain():
                    projections.part()
    for module in record.models:
        del module.__dict__["forward"]
    for name, p in model.named_parameters():
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))
    delattr(model, RECORD)
    return model


def record_of(model: nn.Module) -> _Prepared:
    """What `prepare` did to a model.

    Raises:
        CogsymError: nothing.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        raise CogsymError(f"This {type(model).__name__} is not prepared; call cogsym.prepare(model, plan) first.")
    return record


def state_of(layer: nn.Module) -> PreparedLayer | None:
    """What a prepared layer knows of itself."""
    return vars(layer).get(RECORD)


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers."""
    return model.get_decoder().layers


def possible(layer: nn.Module, keep: Keep) -> Keep:
    """What a layer keeps where `keep` was chosen."""
    return "input" if keep == "nothing" and isinstance(layer, FSDPModule) else keep


def hooked(block: Block) -> str | None:
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


def any_trained(layer: nn.Module) -> bool:
    """Whether a parameter in it needs a gradient."""
    return any(p.requires_grad for p in layer.parameters())


def runs_frozen(layer: nn.Module, block: Block) -> bool:
    """Whether nothing in the layer is trained and its weights can be used without calling its modules."""
    return not any_trained(layer) and all(projections.plain() for projections in block.projections())


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
    known: PreparedLayer = vars(self)[RECORD]
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
    if attentions or position_embeddings is None or hooked(block):
        return own(x)
    by_hand = past_key_values is None and not torch.compiler.is_compiling()
    if by_hand and runs_frozen(self, block) and not _projection_hooks(block):
        try:
            positions = block.positions(position_embeddings, attention_mask, x, self.training)
        except UnknownMaskError:
            return _run_own(self, own, x, past_key_values, known.memory)
        keep = known.memory.of(known.index, x, block.down.modules[0].weight.element_size())
        return run_frozen(block, x, positions, possible(self, keep))
    run: Any = partial(
        block.forward,
        attention_mask=attention_mask,
        position_embeddings=position_embeddings,
        past_key_values=past_key_values,
        position_ids=position_ids,
        use_cache=use_cache,
        **kwargs,
    )
    if _CHECKPOINTS_FORWARD and _checkpointed(self) and past_key_values is None:
        checkpointed: Any = self._gradient_checkpointing_func
        return checkpointed(run, x)
    return run(x)


def _checkpointed(layer: Any) -> bool:
    """Whether transformers' gradient checkpointing is on for a layer."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def _run_own(layer: nn.Module, own: Any, x: Tensor, past_key_values: Any | None, memory: Memory) -> Any:
    """The layer's own forward; a frozen layer's activations are computed again rather than kept."""
    kept = memory.keep == "all" or past_key_values is not None or not x.requires_grad or any_trained(layer)
    if kept or _checkpointed(layer):
        return own(x)
    return checkpoint(own, x, use_reentrant=False)


def _projection_hooks(block: Block) -> bool:
    """Whether a hook waits on a linear module, which the frozen path does not call."""
    modules = [module for projections in block.projections() for module in projections.modules]
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


def _decoder_forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A prepared decoder's forward: a training step that does not ask for a cache has none to fill in each layer."""
    asked = kwargs.get("use_cache") is not None or kwargs.get("past_key_values") is not None or len(args) > 3
    if decoder.training and torch.is_grad_enabled() and not asked:
        kwargs["use_cache"] = False
    return type(decoder).forward(decoder, *args, **kwargs)


def _forward_with_loss(head: Head, *args: Any, **kwargs: Any) -> Any:
    """A prepared model's forward: without logits where only the loss is wanted."""
    labels = kwargs.pop("labels", None)
    if len(args) > 1 or not head.serves(labels, kwargs):
        return type(head.model).forward(head.model, *args, labels=labels, **kwargs)
    return head.forward(labels, **dict(zip(("input_ids",), args, strict=False)), **kwargs)
