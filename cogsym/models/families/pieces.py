"""What decoder layers of transformers are made of: the names most of them use, each with what may differ.

A piece whose module is not of the class that its family has, or asks for what no kernel does, is left to its own
forward, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from transformers.activations import ACT2FN

from cogsym.models.attention import AttentionHalf
from cogsym.models.block import Block
from cogsym.models.guard import class_of
from cogsym.models.half import Half, OwnHalf
from cogsym.models.inputs import QueryScale, Rotary
from cogsym.models.mlp import Gated, MlpHalf, Nonlinearity, Pointwise
from cogsym.models.norm import LayerNorm, ModuleNorm, Norm, RMSNorm
from cogsym.models.projections import Projections
from cogsym.ops import AttentionOptions
from cogsym.ops.activation import Activation

# The classes of transformers' activations that have kernels: a config may name another one than the module holds.
ACTIVATIONS: dict[type, Activation] = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
    type(ACT2FN["gelu_new"]): "gelu_tanh",
    type(ACT2FN["relu"]): "relu",
    type(ACT2FN["relu2"]): "relu2",
}

HALVES = Rotary()  # a column of the first half turns with one of the second, as Llama's
NEIGHBOURS = Rotary(interleaved=True)  # two neighbours turn together, by tables like Llama's

# Makes the norm that is an attribute of a module, or None where the name is None.
MakeNorm = Callable[[Any, str | None], Norm | None]


def rms_norms(layer: Any, offset: float = 0.0, name: str = "RMSNorm") -> MakeNorm:
    """Root-mean-square norms of the layer's family, with `offset` added to their weights."""
    expected = f"{prefix(layer)}{name}"

    def make(owner: Any, attribute: str | None) -> Norm | None:
        if attribute is None:
            return None
        reason = other_class(layer, getattr(owner, attribute), expected)
        return ModuleNorm(owner, attribute, reason) if reason else RMSNorm(owner, attribute, offset)

    return make


def layer_norms(layer: Any, offset: float = 0.0, name: str | None = None) -> MakeNorm:
    """Layer norms: the family's own class with that `name`, or torch's."""
    expected = f"{prefix(layer)}{name}" if name else "LayerNorm"

    def make(owner: Any, attribute: str | None) -> Norm | None:
        if attribute is None:
            return None
        reason = other_class(layer if name else None, getattr(owner, attribute), expected)
        return ModuleNorm(owner, attribute, reason) if reason else LayerNorm(owner, attribute, offset)

    return make


def attention(
    layer: Any,
    norm: Norm | None,
    output_norm: Norm | None = None,
    *,
    fused: bool = False,
    gated: bool = False,
    output: str = "o_proj",
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    normed_rows: Literal["head", "all"] = "head",
    norm_behind_rotation: bool = False,
    rotary: Rotary | None = HALVES,
    query_scale: QueryScale | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    sinks: str = "",
    residual_scale: float = 1.0,
) -> Half:
    """The attention half of a layer with `self_attn`.

    Args:
        layer: the layer.
        norm: before it.
        output_norm: of what it adds to the stream.
        fused: queries, keys and values are one module.
        gated: the queries' module gives a gate behind each head's, for what attention gives.
        output: name of the projection back.
        q_norm: norm of the queries.
        k_norm: norm of the keys.
        normed_rows: whether these take a "head" or "all" of them as a row.
        norm_behind_rotation: whether they stand behind the rotation.
        rotary: how queries and keys are rotated, or None.
        query_scale: how queries grow with their position, or None.
        soft_cap: bound of the logits.
        window: positions that a query sees, itself included.
        sinks: the attribute with a logit for each head that takes part in its softmax.
        residual_scale: factor of what is added.
    """
    module, config = layer.self_attn, layer.self_attn.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    half = AttentionHalf(
        owner=layer,
        name="self_attn",
        norm=norm,
        output_norm=output_norm,
        residual_scale=residual_scale,
        width=config.hidden_size,
        qkv=Projections(
            module,
            ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj"),
            tuple(n * module.head_dim for n in (2 * heads if gated else heads, groups, groups)),
        ),
        gated=gated,
        output=Projections(module, (output,), (config.hidden_size,)),
        head_dim=module.head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        normed_rows=normed_rows,
        norm_behind_rotation=norm_behind_rotation,
        rotary=rotary,
        query_scale=query_scale,
        options=AttentionOptions(scale=module.scaling, window=window, soft_cap=soft_cap),
        sinks=sinks,
    )
    reason = other_class(layer, module, f"{prefix(layer)}Attention")
    if any(isinstance(each, ModuleNorm) for each in (q_norm, k_norm)):
        reason = "the norms of its queries and keys are not known to cogsym"
    if not module.is_causal:
        reason = "its attention is bidirectional"
    return half.on_own_forward(reason) if reason else half


def mlp(
    layer: Any,
    norm: Norm | None,
    output_norm: Norm | None = None,
    *,
    up: tuple[str, ...] = ("gate_proj", "up_proj"),
    gated: bool = True,
    down: str = "down_proj",
    activation: str = "act_fn",
    nonlinearity: Nonlinearity | None = None,
    features: int | None = None,
    residual_scale: float = 1.0,
) -> Half:
    """The MLP half of a layer with `mlp`.

    Args:
        layer: the layer.
        norm: before it.
        output_norm: of what it adds to the stream.
        up: names of gate and up, or of the one module that is both, or of up alone.
        gated: there is a gate.
        down: name of the projection back.
        activation: name of the activation.
        nonlinearity: where it is not one of `ACTIVATIONS`.
        features: F; the config's unless given.
        residual_scale: factor of what is added.
    """
    module = layer.mlp
    config = getattr(layer, "self_attn", module).config  # which some MLPs have not, and linear attention never
    cls = type(getattr(module, activation, None))
    kind, reason = ACTIVATIONS.get(cls), other_class(layer, module, f"{prefix(layer)}MLP")
    if kind is None and nonlinearity is None:
        reason = reason or f"the activation {cls.__name__} has no kernel"
    made = nonlinearity or (Gated if gated else Pointwise)(module, activation, kind or "silu")
    half = MlpHalf(
        owner=layer,
        name="mlp",
        norm=norm,
        output_norm=output_norm,
        residual_scale=residual_scale,
        width=config.hidden_size,
        up=Projections(module, up, (features or config.intermediate_size,) * (2 if gated else 1)),
        down=Projections(module, (down,), (config.hidden_size,)),
        nonlinearity=made,
    )
    return half.on_own_forward(reason) if reason else half


def experts(layer: Any, norm: Norm | None, name: str = "SparseMoeBlock") -> Half:
    """The MLP half of a layer whose `mlp` is a mixture of experts of the family's class with that `name`, which run
    their own forward; it may be a plain MLP in some layers."""
    if other_class(layer, layer.mlp, f"{prefix(layer)}{name}"):
        return mlp(layer, norm)
    return OwnHalf(
        owner=layer, name="mlp", norm=norm, width=layer.hidden_size, reason="its experts are chosen token by token",
        call=MlpHalf.call_own,
    )  # fmt: skip


def llama_like(
    layer: Any,
    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ),
    offset: float = 0.0,
    qk_norm: Literal["head", "all"] | None = None,
    residual_scale: float = 1.0,
    fused: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    rotary: Rotary | None = HALVES,
    query_scale: QueryScale | None = None,
    dropout: float = 0.0,
) -> Block:
    """A layer like Llama's: root-mean-square norms, rotated grouped heads, a gated MLP.

    Args:
        layer: the layer.
        norms: names of those before attention, behind it, before the MLP, behind it.
        offset: added to the norms' weights.
        qk_norm: queries and keys are normed a "head" at a time, "all" heads together, or not.
        residual_scale: factor of what the halves add.
        fused: queries, keys and values are one module, and so are gate and up.
        window: positions that a query sees, itself included.
        soft_cap: bound of attention's logits.
        rotary: how queries and keys are rotated, or None.
        query_scale: how queries grow with their position, or None.
        dropout: share of what the halves add that is dropped in training.
    """
    make = rms_norms(layer, offset)
    q_norm, k_norm = (make(layer.self_attn, name if qk_norm else None) for name in ("q_norm", "k_norm"))
    before, behind, before_mlp, behind_mlp = (make(layer, name) for name in norms)
    return Block(
        attention(
            layer, before, behind, fused=fused, q_norm=q_norm, k_norm=k_norm, normed_rows=qk_norm or "head",
            rotary=rotary, query_scale=query_scale, soft_cap=soft_cap, window=window, residual_scale=residual_scale,
        ),
        mlp(
            layer, before_mlp, behind_mlp, up=("gate_up_proj",) if fused else ("gate_proj", "up_proj"),
            activation="activation_fn" if fused else "act_fn", residual_scale=residual_scale,
        ),
        dropout=dropout,
    )  # fmt: skip


def prefix(layer: Any) -> str:
    """What the names of a family's classes begin with."""
    return class_of(layer).__name__.removesuffix("DecoderLayer")


def other_class(layer: Any, module: Any, name: str) -> str:
    """Why a module is not the class of that name beside the layer's (in torch.nn where there is no layer), or ""."""
    expected = "torch.nn.modules" if layer is None else class_of(layer).__module__
    cls = type(module)
    if cls.__name__ == name and (cls.__module__ == expected or (layer is None and cls.__module__.startswith(expected))):
        return ""
    return f"{cls.__qualname__} stands where {name} is expected"
