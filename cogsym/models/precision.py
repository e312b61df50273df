"""What a model's weights are stored in, and what it computes in.

A checkpoint in bfloat16 takes half the memory of one in float32, but a processor without a unit for it multiplies it at
a tenth of the speed. `widen` lets such a model compute in float32 from the weights as they lie: linear maps go through
`cogsym.ops.linear`, embeddings give float32, and what is left (norms, biases, a per cent of the weights) is widened.
Then everything is as in a float32 model with the same weights. `narrow` undoes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cogsym import ops
from cogsym.models.attachment import attach, attached, attachment, detach, foreign_forward
from cogsym.ops.products import native, why_not_native

HALF_DTYPES = (torch.bfloat16, torch.float16)
_WIDENED = "_cogsym_widened"  # the attribute of a module that says what its own parameters and buffers were in


def widen(model: nn.Module) -> None:
    """Let a model with weights of 16 bits compute in float32, in place.

    Modules whose forward another library has replaced, and those that are no plain `nn.Linear` or `nn.Embedding` (nor
    Gemma's scaled one), have their own weights widened.
    """
    for module in model.modules():
        forward = _forward_of(module)
        if forward and module.weight.dtype in HALF_DTYPES and "forward" not in vars(module):
            attach(module, forward, True)
        elif not is_stored(module):
            own = {**module._parameters, **module._buffers}
            half = {name: t.dtype for name, t in own.items() if t is not None and t.dtype in HALF_DTYPES}
            for name in half:
                tensor = getattr(module, name)
                tensor.data = tensor.data.float()
            if half:
                vars(module)[_WIDENED] = half


def narrow(model: nn.Module) -> None:
    """Undo `widen`; what is stored in float32 by now stays so only where `widen` did not put it there."""
    for module in model.modules():
        if is_stored(module):
            detach(module, _forward_of(module))
        for name, dtype in vars(module).pop(_WIDENED, {}).items():
            tensor = getattr(module, name)
            tensor.data = tensor.data.to(dtype)


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Of parameters and buffers that `widen` widened, by name: what they were in."""
    return {
        f"{prefix}.{name}" if prefix else name: dtype
        for prefix, module in model.named_modules()
        for name, dtype in vars(module).get(_WIDENED, {}).items()
    }


def is_stored(module: nn.Module) -> bool:
    """Whether a module computes in float32 from a weight as it lies."""
    forward = _forward_of(module)
    return forward is not None and attached(module, forward) and not foreign_forward(module)


def stream_dtype(model: Any) -> torch.dtype:
    """Of a causal language model's residual stream."""
    embeddings = model.get_input_embeddings()
    return torch.float32 if is_stored(embeddings) else embeddings.weight.dtype


def computed_dtype(module: nn.Module) -> torch.dtype:
    """What a part of a model computes in, outside of autocast; it has parameters."""
    if any(map(is_stored, module.modules())):
        return torch.float32
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def should_widen(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of a type are better multiplied in float32."""
    return dtype in HALF_DTYPES and device.type == "cpu" and not native(dtype)


def products_sentence(model: nn.Module, device: torch.device) -> str | None:
    """What a model's weights of 16 bits are multiplied in and why, one line; None where nothing else was to expect."""
    stored = next((p.dtype for m in model.modules() if is_stored(m) for p in m.parameters(False)), None)
    dtype = stored or next((p.dtype for p in model.parameters() if p.dtype in HALF_DTYPES), None)
    if dtype is None or device.type != "cpu":
        return None
    name = str(dtype).removeprefix("torch.")
    if stored:
        why = ", as it began" if native(dtype) else f": {why_not_native(dtype)}"
        return f"{name} weights, float32 products{why}"
    if not native(dtype):
        return f"Warning: {name} products, and {why_not_native(dtype)}; with --dtype auto they are float32 products."
    return None


def _linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    if attachment(module) is None:
        return nn.Linear.forward(module, x)
    return ops.linear(x, module.weight, module.bias)


def _embedding_forward(module: nn.Embedding, ids: Tensor) -> Tensor:
    rows = nn.Embedding.forward(module, ids)
    return rows if attachment(module) is None else rows.float()


def _scaled_embedding_forward(module: Any, ids: Tensor) -> Tensor:
    if attachment(module) is None:
        rows: Tensor = module.__class__.forward(module, ids)
        return rows
    return nn.Embedding.forward(module, ids).float() * module.embed_scale.to(module.weight.dtype).float()


_FORWARDS: dict[type, Any] = {nn.Linear: _linear_forward, nn.Embedding: _embedding_forward}


def _forward_of(module: nn.Module) -> Any:
    """The forward that lets a module compute from a weight as it lies; None where there is none."""
    # Gemma's, of which each of its generations in transformers has a copy.
    if module.__class__.__name__.endswith("TextScaledWordEmbedding") and isinstance(module, nn.Embedding):
        return _scaled_embedding_forward
    return _FORWARDS.get(module.__class__)
