"""Attach the plan and the fast blocks to an ordinary Hugging Face model, and take them off again.

`prepare` sets which parameters need a gradient and gives decoder layers and the model with the head an instance
attribute `forward`. Classes, parameters, buffers and `state_dict` keys stay as they are, so everything that works with
the model goes on working; deleting the attributes undoes it. A frozen layer's weights of the same input are laid
beside each other in memory, wherever `model.to` moves them, and have storage of their own again after `restore`.

Wrap the prepared model for several processes as any other. A layer that FSDP2's `fully_shard` shards by itself has its
weights only while it runs or its own gradient is computed, so it cannot be computed again with a run of others and
keeps its input where "nothing" was chosen. A layer sharded before `prepare` runs its own forward.

Under `torch.compile` a frozen layer is traced as a trained one is, on the same operations and in one graph; what is
then kept for the backward pass is the compiler's choice, and `keep` has no say.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from cogsym.decoder import decoder_of, layers_of
from cogsym.errors import CogsymError
from cogsym.models import Block, find_head
from cogsym.models.attachment import RECORD, attach, attached, attachment, detach
from cogsym.models.attention import AttentionHalf
from cogsym.models.head import Head
from cogsym.models.inputs import LayerInputs
from cogsym.models.int8 import frozen_to_int8, to_original
from cogsym.models.masks import UnknownMaskError
from cogsym.models.projections import Projections
from cogsym.plan import LayerPlan, Part
from cogsym.training.autograd import run_frozen
from cogsym.training.keep import Memory
from cogsym.training.layer import PreparedLayer, possible, wants, why_whole
from cogsym.training.short_mask import PreparedDecoder
from cogsym.training.streamed import on_disk

# Newer releases checkpoint in the class's forward, which a prepared layer does not call; older ones around the call.
_CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)

_CACHE_WITH_POSITIONS = (
    "A training step was given position_ids and fills a cache, as transformers does unless told otherwise; pass "
    "use_cache=False, and documents that the positions pack do not attend to each other and frozen layers keep less."
)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did to a model, kept on it for `explain` and `restore`.

    Attributes:
        plan: which parts are trained.
        requires_grad: of each parameter, before and as `prepare` left it.
        memory: what frozen layers keep.
        head: the head whose loss needs no logits, or None.
        logits: they are made all the same.
    """

    plan: LayerPlan
    requires_grad: dict[str, tuple[bool, bool]]
    memory: Memory
    head: Head | None
    logits: bool


def prepare(
    model: Model,
    plan: LayerPlan,
    *,
    keep: str = "auto",
    memory_budget: int | None = None,
    frozen_weights: Literal["int8"] | None = None,
    logits: bool = False,
) -> Model:
    """Freeze what `plan` does not train and run the decoder layers on cogsym's kernels.

    Call it after the model is on its device and after peft has added adapters, and before the optimizer is built. In
    a peft model what is trainable already stays so in the planned layers and outside of layers (`modules_to_save`,
    `trainable_token_indices`), and nothing else is.

    In training mode a call with labels returns the loss without logits, which are then never made, unless `logits` asks
    for them; in evaluation mode there are logits as ever. A training step has no cache unless `use_cache=True` asks for
    one, and then frozen layers keep what trained ones do. Where transformers' gradient checkpointing is on, trained
    layers follow it; frozen ones keep what `keep` says (older releases checkpoint around a layer's call, and both
    follow it).

    Args:
        model: a decoder model from transformers (`AutoModelForCausalLM`), or peft's wrapper around one.
        plan: which parts are trained. A second call replaces the plan of the first.
        keep: what a frozen layer through which a gradient flows holds until the backward pass: "all", "attention",
            "input", "offload" or "nothing" (`cogsym.training.autograd`), each less than the one before and repeating
            more; or "auto", the mix that repeats least within `memory_budget`, chosen when a batch of a new shape
            comes.
        memory_budget: bytes for "auto"; half of what is free by default.
        frozen_weights: "int8" holds the linear maps of frozen layers as 8-bit integers with a scale a row
            (`cogsym.ops.int8_linear`), what another library has quantised left as it is. The model must have been
            loaded from safetensors, from where its `state_dict` and `restore` read the original weights again.
        logits: make the logits in training too, for code that reads them beside the loss; they are the largest tensor
            of a step.

    Returns:
        The same model, changed in place.

    Raises:
        CogsymError: the model has no decoder layers where transformers keeps them, or does not fit the plan; an
            unknown `keep` or `frozen_weights`; or weights to be quantised are not in the folder the model came from.
    """
    if frozen_weights not in (None, "int8"):
        raise CogsymError(f"frozen_weights is {frozen_weights!r}, expected 'int8', or None for weights as they are.")
    memory = Memory(keep, memory_budget)
    decoder = decoder_of(model)
    if frozen_weights and any(map(on_disk, layers_of(model))):
        raise CogsymError(
            f"frozen_weights is {frozen_weights!r} and the frozen layers are read from disk, as they are stored; leave "
            "one of the two out."
        )
    parts = plan.parts(model)
    if (on := next((i for i in plan.trained if on_disk(layers_of(model)[i])), None)) is not None:
        raise CogsymError(f"The plan trains layer {on}, whose weights are on disk; load the model with the same plan.")
    if hasattr(model, RECORD):
        restore(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    adapters = hasattr(model, "peft_config")
    wanted = [(p, _needs_gradient(part, p, adapters)) for part in parts for p in part.parameters]
    for p, needed in wanted:
        p.requires_grad_(needed)
    if not any(p.requires_grad for p in model.parameters()):
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
        raise CogsymError(
            f"The plan ({plan}) leaves no parameter to train; with peft, give the adapter the plan's layers "
            "(layers_to_transform)."
        )
    frozen: list[Projections] = []
    blocks: list[Block | None] = []
    for i, layer in enumerate(layers_of(model)):
        known = PreparedLayer(i, memory, isinstance(layer, FSDPModule), on_disk(layer))
        attach(layer, layer_forward, known)
        if known.streamed is None:
            layer.__dict__["_apply"] = partial(moved, layer)
        how = known.read(layer)
        blocks.append(how.block)
        if how.block is not None and how.frozen:
            if not how.block.dropout:
                memory.blocks[i] = how.block
            frozen += how.block.projections() if known.streamed is None else ()
    head = None if logits else find_head(model)
    _attach_with_signature(decoder, decoder_forward, PreparedDecoder(decoder, blocks))
    if head is not None:
        _attach_with_signature(head.model, forward_with_loss, head)
    requires_grad = {name: (before[name], p.requires_grad) for name, p in model.named_parameters()}
    memory.trained = [p for p in model.parameters() if p.requires_grad]
    setattr(model, RECORD, Prepared(plan, requires_grad, memory, head, logits))
    if frozen_weights:
        try:
            frozen_to_int8(model, [module for each in frozen if each.plain() for module in each.modules])
        except CogsymError:
            restore(model)
            raise
    for projections in frozen:
        projections.join()
    return model


def _needs_gradient(part: Part, p: nn.Parameter, adapters: bool) -> bool:
    """Whether the plan trains a parameter of a part; in a peft model, of those that peft trains.

    Raises:
        CogsymError: it would, and the parameter is quantised.
    """
    if adapters:
        return p.requires_grad and (part.trained or not part.name.startswith("layer "))
    if part.trained and not p.is_floating_point():
        raise CogsymError(
            f"The plan trains {part.name}, which holds weights quantised to {str(p.dtype).removeprefix('torch.')}, "
            "expected floating point; add LoRA adapters with peft, or load that part unquantised."
        )
    return part.trained


def restore(model: Model) -> Model:
    """Undo `prepare`: the layers run their own forward, `requires_grad` is as it was before.

    What another library has put on the model since stays, and so does a `requires_grad` that somebody has changed
    since, such as those that change with peft's active adapter.

    Raises:
        CogsymError: the model is not prepared; or weights that were quantised are not where they came from.
    """
    record = record_of(model)
    to_original(model)
    for layer in layers_of(model):
        known: PreparedLayer | None = detach(layer, layer_forward)
        if getattr(vars(layer).get("_apply"), "func", None) is moved:
            del layer.__dict__["_apply"]
        if known is not None:
            block = known.read(layer).block
            for projections in block.projections() if block else ():
                if projections.plain():
                    projections.part()
    detach(decoder_of(model), decoder_forward)
    if record.head is not None:
        detach(record.head.model, forward_with_loss)
    switched_off = _switched_off(model)
    for name, p in model.named_parameters():
        before, prepared = record.requires_grad.get(name, (p.requires_grad,) * 2)
        if p.requires_grad is prepared and p not in switched_off:
            p.requires_grad_(before)
    delattr(model, RECORD)
    return model


def _switched_off(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of peft's adapters that are not active."""
    modules: Iterable[Any] = model.modules()
    return {
        p
        for tuned in modules
        for kind in getattr(tuned, "adapter_layer_names", ())
        for adapter, its in getattr(tuned, kind).items()
        if adapter not in tuned.active_adapters
        for p in (its.parameters() if isinstance(its, nn.Module) else [its])
    }


def record_of(model: nn.Module) -> Prepared:
    """What `prepare` did to a model.

    Raises:
        CogsymError: nothing.
    """
    record: Prepared | None = getattr(model, RECORD, None)
    if record is None:
        raise CogsymError(f"This {type(model).__name__} is not prepared; call cogsym.prepare(model, plan) first.")
    return record


def moved(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """A prepared layer's `_apply`, by which `model.to` moves each parameter apart: those of one input lie together."""
    type(layer)._apply(layer, *args, **kwargs)
    known: PreparedLayer | None = attachment(layer)
    if known is not None:
        block, _, _, frozen = known.read(layer)
        for projections in block.projections() if block and frozen else ():
            projections.join()
    return layer


def layer_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A prepared layer's forward; the arguments are those of its class's."""
    known: PreparedLayer | None = attachment(layer)
    own: Any = partial(type(layer).forward, layer)
    if known is None:
        return own(hidden_states, *args, **kwargs)
    how, x = known.decided(kwargs.get("attention_mask")) or known.read(layer), hidden_states
    block, inputs, streamed = how.block, LayerInputs(kwargs), known.streamed
    own = known.refuse if streamed else own
    if block is None or args or (layer.training and block.dropout):
        return _run_own(layer, partial(own, **kwargs), x, args, known.memory)
    if wants(block, kwargs, "output_attentions") or not _has_tables(block, inputs):
        return own(x, **kwargs)
    by_hand = how.frozen and inputs.cache is None and not torch.compiler.is_compiling()
    if inputs.cache is None:
        try:
            inputs.positions = block.positions(inputs, x, layer.training)
        except UnknownMaskError as error:
            block = known.with_own_attention(str(error)) if by_hand else block
            streamed = streamed and streamed.with_own_attention(str(error))
    if by_hand:
        if why_whole(block, kwargs, layer.training):
            return _run_own(layer, partial(own, **kwargs), x, args, known.memory)
        keep = known.memory.of(known.index, x)
        return run_frozen(streamed or block, x, inputs, possible(layer, keep))
    if streamed:
        return own(x)
    if _CHECKPOINTS_FORWARD and _checkpointed(layer) and inputs.cache is None:
        return layer._gradient_checkpointing_func(partial(block.forward, inputs=inputs), x)
    return block.forward(x, inputs)


def _has_tables(block: Block, inputs: LayerInputs) -> bool:
    """Whether the layer was given what our attention rotates by."""
    needed = isinstance(block.attention, AttentionHalf) and block.attention.rotary is not None
    return not needed or inputs.position_embeddings is not None


def _checkpointed(layer: Any) -> bool:
    """Whether transformers' gradient checkpointing is on for a layer."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def _run_own(layer: nn.Module, own: Any, x: Tensor, args: tuple[Any, ...], memory: Memory) -> Any:
    """The layer's own forward; a frozen layer's activations are computed again rather than kept."""
    cached = any(isinstance(value, Cache) for value in (*args, *own.keywords.values()))
    trained = any(p.requires_grad for p in layer.parameters())
    if memory.keep == "all" or cached or not x.requires_grad or trained or _checkpointed(layer):
        return own(x, *args)
    return checkpoint(own, x, *args, use_reentrant=False)


def _attach_with_signature(module: nn.Module, forward: Any, record: Any) -> None:
    """As `attach`; transformers reads off the signature which columns of a dataset the model takes."""
    signature = inspect.signature(module.forward)
    attach(module, forward, record)
    if attached(module, forward):
        module.__dict__["forward"].__signature__ = signature


def decoder_forward(decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A prepared decoder's forward: a training step that does not ask for a cache has none to fill in each layer.

    But transformers reads packed documents off the positions only where there is no cache, so that a step with
    positions is left as transformers has it: what attends to what is the caller's to say.
    """
    known: PreparedDecoder | None = attachment(decoder)
    asked = kwargs.get("use_cache") is not None or kwargs.get("past_key_values") is not None or len(args) > 2
    if known and decoder.training and torch.is_grad_enabled() and not asked:
        if kwargs.get("position_ids") is None:
            kwargs["use_cache"] = False
        elif getattr(decoder.config, "use_cache", False):
            warnings.warn(_CACHE_WITH_POSITIONS, stacklevel=2)
    if known and len(args) < 2:
        kwargs = known.with_short_mask(decoder, layer_forward, args, kwargs)
    return type(decoder).forward(decoder, *args, **kwargs)


def forward_with_loss(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A prepared model's forward: without logits where only the loss is wanted."""
    head: Head | None = attachment(model)
    labels = kwargs.pop("labels", None)
    if head is None or len(args) > 1 or not head.serves(labels, kwargs):
        return type(model).forward(model, *args, labels=labels, **kwargs)
    return head.forward(labels, **dict(zip(("input_ids",), args, strict=False)), **kwargs)
