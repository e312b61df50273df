"""Inputs of every operation for `test_fuzz.py`: shapes, options and magnitudes that hypothesis draws.

A strategy yields a `Case`: how its tensors are drawn, the operation, plain PyTorch's own way (as a model would call it,
at any precision, float64 among them), and of what magnitude the terms are that results are sums of, where that is not
the results' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import (
    AttentionOptions,
    activation,
    attention,
    decode_attention,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    token_scores,
    xielu,
)

Tensors = dict[str, Tensor]
Compute = Callable[..., tuple[Tensor, ...]]


@dataclass
class Case:
    """One shape of one operation.

    Attributes:
        draw: makes its tensors, float64 but for indices, anew at every call.
        ours: the operation, of the tensors.
        plain: plain PyTorch, of the tensors and of the dtype that a result in between has in memory.
        outputs: names of what both return.
        differentiated: the tensors that get a gradient.
        terms: of the float64 tensors, dout among them, and float64 results: magnitudes of what a named result sums up.
        blocks: rows and columns of a block of logits, or None: as in use.
    """

    draw: Callable[[], Tensors]
    ours: Compute
    plain: Compute
    outputs: tuple[str, ...]
    differentiated: tuple[str, ...] = ()
    terms: Callable[[Tensors, Tensors], Tensors] = lambda tensors, results: {}
    blocks: tuple[int, int] | None = None


def values(draw: Any, largest: int = 3) -> Callable[..., Tensor]:
    """A way to draw tensors: of a magnitude up to 2^largest, with long tails or without, all of one sign or not."""
    scale = 2.0 ** draw(st.integers(-4, largest))
    kind = draw(st.sampled_from(("normal", "tails", "positive", "few")))

    def make(*shape: int) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64)
        if kind == "tails":
            x = (x * x.abs()).clamp(-8, 8)
        if kind == "positive":
            x = x.abs()
        if kind == "few":
            x = x.round()
        return scale * x

    return make


def sizes(most: int) -> st.SearchStrategy[int]:
    """Small ones, and some that blocks and vectors do not divide."""
    return st.one_of(st.integers(1, min(most, 9)), st.integers(1, most))


def chosen(draw: Any, *names: str) -> tuple[str, ...]:
    """Those that get a gradient, one at least."""
    return tuple(sorted(draw(st.sets(st.sampled_from(names), min_size=1)), key=names.index))


# ---------------------------------------------------------------- norms, rotary, activations


@st.composite
def norms(draw: Any, own: Callable[..., Any], plain: Callable[..., Tensor], biased: bool) -> Case:
    rows, D, offset = draw(sizes(40)), draw(sizes(600)), draw(st.sampled_from((0.0, 1.0)))
    residual, bias = draw(st.booleans()), biased and draw(st.booleans())
    make, make_weight, make_dout = values(draw), values(draw, 0), values(draw)
    eps = draw(st.sampled_from((1e-6, 1e-5)))

    def tensors() -> Tensors:
        drawn = {"x": make(rows, D), "residual": make(rows, D), "weight": make_weight(D), "bias": make_weight(D)}
        return {**{k: drawn[k] for k in names}, **{f"d{o}": make_dout(rows, D) for o in outputs}}

    def ours(weight: Tensor, x: Tensor, residual: Tensor | None = None, bias: Any = None) -> tuple[Tensor, ...]:
        more = (bias,) if biased else ()
        y = own(x, weight, *more, eps, residual=residual, offset=offset)
        return y if residual is not None else (y,)

    def theirs(
        x: Tensor, residual: Tensor | None = None, weight: Any = None, bias: Any = None, stored: Any = None
    ) -> tuple[Tensor, ...]:
        h = x if residual is None else x + residual
        h = h + (h.detach().to(stored).to(h.dtype) - h.detach())  # the norm sees it as it is stored
        y = plain(h, weight, bias, eps, offset)
        return (y,) if residual is None else (y, h)

    def terms(t: Tensors, results: Tensors) -> Tensors:
        h = t["x"] + t.get("residual", 0)
        h = h - h.mean(-1, keepdim=True) if biased else h
        r = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
        dx = ((t["weight"].abs() + offset) * t["dy"].abs() * r).amax(-1, keepdim=True) + t.get("dh", 0)
        return {"dx": dx, "dresidual": dx, "dweight": (t["dy"] * h * r).abs().sum(0), "dbias": t["dy"].abs().sum(0)}

    names = ["x", *["residual"] * residual, "weight", *["bias"] * bias]
    outputs = ("y", "h") if residual else ("y",)
    return Case(tensors, ours, theirs, outputs, chosen(draw, *names), terms)


def plain_rms_norm(h: Tensor, weight: Tensor, bias: None, eps: float, offset: float) -> Tensor:
    if not offset:
        return F.rms_norm(h, weight.shape, weight, eps)
    compute = h if h.dtype == torch.float64 else h.float()
    return (F.rms_norm(compute, weight.shape, None, eps) * (offset + weight.to(compute.dtype))).to(h.dtype)


def plain_layer_norm(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    return F.layer_norm(h, weight.shape, weight + offset, bias, eps)


@st.composite
def rotations(draw: Any) -> Case:
    B, T, H, D = draw(sizes(3)), draw(sizes(40)), draw(sizes(5)), 2 * draw(sizes(50))
    half, interleaved, inverse = draw(st.integers(1, D // 2)), draw(st.booleans()), draw(st.booleans())
    make, make_dout = values(draw), values(draw)
    angles = torch.arange(T)[None, :, None] * 10000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()

    def plain(x: Tensor, cos: Tensor, sin: Tensor, stored: Any) -> tuple[Tensor, ...]:  # as transformers does it
        c, s = (t[:, :, None] for t in (cos, -sin if inverse else sin))
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        a, b = a * c - b * s, b * c + a * s
        turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
        return (torch.cat((turned, rest), -1),)

    return Case(
        lambda: {"x": make(B, T, H, D), "cos": cos, "sin": sin, "dy": make_dout(B, T, H, D)},
        lambda x, cos, sin: (rotary(x, cos, sin, interleaved=interleaved, inverse=inverse),),
        plain,
        ("y",),
        ("x",),
    )


PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@st.composite
def activations(draw: Any) -> Case:
    rows, N, kind, gated = (
        draw(sizes(20)),
        draw(sizes(600)),
        draw(st.sampled_from(sorted(PLAIN_ACTIVATIONS))),
        draw(st.booleans()),
    )
    make, make_up, make_dout = values(draw), values(draw), values(draw)
    act, names = PLAIN_ACTIVATIONS[kind], ("gate", "up")[: 1 + gated]

    def plain(gate: Tensor, up: Tensor | None = None, stored: Any = None) -> tuple[Tensor, ...]:
        return (act(gate) if up is None else act(gate) * up,)

    def ours(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, ...]:
        return (activation(gate, kind) if up is None else gated_activation(gate, up, kind),)

    def tensors() -> Tensors:
        return {"gate": make(rows, N), **({"up": make_up(rows, N)} if gated else {}), "dz": make_dout(rows, N)}

    return Case(tensors, ours, plain, ("z",), chosen(draw, *names))


@st.composite
def xielus(draw: Any) -> Case:
    rows, N, beta, eps = draw(sizes(20)), draw(sizes(600)), 0.5, -1e-6
    make, make_alpha, make_dout = values(draw), values(draw, 0), values(draw)

    def plain(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, stored: Any) -> tuple[Tensor, ...]:
        below = (torch.expm1(torch.min(x, x.new_tensor(eps))) - x) * alpha_n + beta * x
        return (torch.where(x > 0, alpha_p * x * x + beta * x, below),)

    def terms(t: Tensors, results: Tensors) -> Tensors:
        x, d = t["x"], t["dy"].abs()
        bend = (torch.expm1(x.clamp(max=0)) - x).abs()
        above, below = (d * x.square())[x > 0].sum(), (d * bend)[x <= 0].sum()
        # A bend is the difference of two that may be far larger.
        return {"dalpha_p": above, "dalpha_n": below, "y": t["alpha_n"].abs() * x.abs() + beta * x.abs(),
                "dx": d * (t["alpha_n"].abs() + beta)}  # fmt: skip

    return Case(
        lambda: {"x": make(rows, N), "alpha_p": make_alpha(1), "alpha_n": make_alpha(1), "dy": make_dout(rows, N)},
        lambda x, alpha_p, alpha_n: (xielu(x, alpha_p, alpha_n, beta, eps),),
        plain,
        ("y",),
        chosen(draw, "x", "alpha_p", "alpha_n"),
        terms,
    )


# ---------------------------------------------------------------- attention


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, soft_cap: float | None, sinks: Any) -> Tensor:
    """[B, H, T, D] as transformers' eager attention: softmax in float32 (float64 for float64)."""
    x = q @ k.mT * scale
    if soft_cap:
        x = torch.tanh(x / soft_cap) * soft_cap
    x = x.masked_fill(~seen, -torch.inf)
    x = x if x.dtype == torch.float64 else x.float()
    if sinks is not None:
        x = torch.cat((x, sinks.to(x.dtype).view(-1, 1, 1).expand(*x.shape[:-1], 1)), -1)
    return x.softmax(-1)[..., : k.shape[-2]].to(q.dtype) @ v


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, soft_cap: Any, sinks: Any) -> Tensor:
    """[B, H, T, D], by PyTorch's own kernel where it has what is asked for."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if soft_cap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)
    return eager(q, k, v, seen, scale, soft_cap, sinks)


def weights(t: Tensors, seen: Tensor, scale: float, soft_cap: Any) -> tuple[Tensor, ...]:
    """p · (1 + |x|), q, k and v, by query head; heads are dimension 1."""
    groups = t["q"].shape[1] // t["k"].shape[1]
    q, k, v = t["q"], t["k"].repeat_interleave(groups, 1), t["v"].repeat_interleave(groups, 1)
    x = q @ k.mT * scale
    if soft_cap:
        x = torch.tanh(x / soft_cap) * soft_cap
    x = x.masked_fill(~seen, -torch.inf)
    sinks = t["sinks"].view(-1, 1, 1).expand(*x.shape[:-1], 1) if "sinks" in t else x[..., :0]
    p = torch.cat((x, sinks), -1).softmax(-1)[..., : k.shape[-2]].nan_to_num()
    # A logit's rounding, absolute, is e^x's, relative.
    return p * (1 + x.masked_fill(~seen, 0).abs()), q, k, v


@st.composite
def attentions(draw: Any) -> Case:
    B, T, KV, G, D = draw(sizes(2)), draw(sizes(150)), draw(sizes(3)), draw(sizes(4)), draw(sizes(80))
    H, scale = KV * G, D**-0.5 * draw(st.sampled_from((0.5, 1.0, 1.7)))
    window = draw(st.none() | st.integers(1, T))
    soft_cap = draw(st.none() | st.sampled_from((2.0, 30.0)))
    cuts = sorted({0, *draw(st.lists(st.integers(0, T - 1), max_size=3))})
    make_q, make_v, make_dout = values(draw), values(draw), values(draw)
    with_sinks = draw(st.booleans()) and draw(st.booleans())
    place = torch.arange(T)
    starts = torch.tensor([max(c for c in cuts if c <= t) for t in range(T)], dtype=torch.int32).expand(B, T)
    seen = (place <= place[:, None]) & (place >= starts[0][:, None]) & (place > place[:, None] - (window or T))

    def tensors() -> Tensors:
        q, k, v = (make(B, T, heads, D) for make, heads in ((make_q, H), (make_q, KV), (make_v, KV)))
        return {"q": q, "k": k, "v": v, **({"sinks": make_q(H)} if with_sinks else {}), "do": make_dout(B, T, H, D)}

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
        fused = torch.cat((q, k, v), 2).split((H, KV, KV), 2)
        options = AttentionOptions(scale, starts if len(cuts) > 1 else None, window, soft_cap, sinks)
        return (attention(*fused, options)[0],)

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, stored: Any = None) -> tuple[Tensor, ...]:
        return (plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), seen, scale, soft_cap, sinks).transpose(1, 2),)

    def terms(t: Tensors, results: Tensors) -> Tensors:
        t = {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in t.items()}
        o, do = results["o"].transpose(1, 2), t["do"]
        p, q, k, v = weights(t, seen, scale, soft_cap)
        delta = (do * o).abs().sum(-1, keepdim=True)
        dx = scale * p * (do.abs() @ v.abs().mT + delta)
        of = {"o": p @ v.abs(), "dq": dx @ k.abs(), "dk": dx.mT @ q.abs(), "dv": p.mT @ do.abs()}
        of["dk"], of["dv"] = (x.unflatten(1, (KV, G)).sum(2) for x in (of["dk"], of["dv"]))
        return {**of, "dsinks": delta.sum((0, 2, 3))}

    names = ("q", "k", "v", *["sinks"] * with_sinks)
    return Case(tensors, ours, plain, ("o",), chosen(draw, *names), terms)


@st.composite
def decodings(draw: Any) -> Case:
    N, S, KV, G, D = draw(sizes(12)), draw(sizes(400)), draw(sizes(3)), draw(sizes(4)), draw(sizes(80))
    H, scale = KV * G, D**-0.5 * draw(st.sampled_from((0.5, 1.0, 1.7)))
    soft_cap, with_sinks = draw(st.none() | st.sampled_from((2.0, 30.0))), draw(st.booleans()) and draw(st.booleans())
    make_q, make_v = values(draw), values(draw)
    split = draw(st.integers(0, S))  # a prompt that rows share, and behind it what is theirs
    ranges = [[(0, split), tuple(sorted((draw(st.integers(split, S)), draw(st.integers(split, S)))))] for _ in range(N)]
    begins, ends = torch.tensor(ranges).unbind(-1)
    s = torch.arange(S)
    seen = ((begins[:, :, None] <= s) & (s < ends[:, :, None])).any(1)

    def tensors() -> Tensors:
        q, k, v = make_q(N, H, D), make_q(S, KV, D), make_v(S, KV, D)
        return {"q": q, "k": k, "v": v, **({"sinks": make_q(H)} if with_sinks else {})}

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, ...]:
        return (decode_attention(q, k, v, begins, ends, AttentionOptions(scale, soft_cap=soft_cap, sinks=sinks)),)

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, stored: Any = None) -> tuple[Tensor, ...]:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        o = plain_attention(*heads, seen, scale, soft_cap, sinks)[0].transpose(0, 1)
        return (o.masked_fill(~seen.any(1)[:, None, None], 0),)

    def terms(t: Tensors, results: Tensors) -> Tensors:
        t = {name: x.transpose(0, 1)[None] if x.dim() == 3 else x for name, x in t.items()}
        p, _, _, v = weights(t, seen, scale, soft_cap)
        return {"o": (p @ v.abs())[0].transpose(0, 1)}

    return Case(tensors, ours, plain, ("o",), (), terms)


# ---------------------------------------------------------------- the head


def plain_logits(hidden: Tensor, weight: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """As transformers computes them."""
    logits = F.linear(hidden, weight) * scale
    logits = torch.tanh(logits / soft_cap) * soft_cap if soft_cap else logits
    return logits if logits.dtype == torch.float64 else logits.float()


@st.composite
def heads(draw: Any, scored: bool) -> Case:
    N, D, V = draw(sizes(40)), draw(sizes(100)), draw(sizes(300))
    scale, soft_cap = draw(st.sampled_from((1.0, 0.25))), draw(st.none() | st.sampled_from((2.0, 30.0)))
    smoothing = 0.0 if scored else draw(st.sampled_from((0.0, 0.0, 0.1)))
    blocks = draw(st.sampled_from((None, (8, 37))))
    make, make_weight, make_dout = values(draw, 1), values(draw, 1), values(draw)
    targets = torch.tensor(draw(st.lists(st.integers(0, V - 1) | st.just(-100), min_size=N, max_size=N)))
    kept = (targets != -100).double()

    def tensors() -> Tensors:
        return {
            "hidden": make(N, D),
            "weight": make_weight(V, D) / D**0.5,
            **({} if scored else {"dloss": make_dout(N)}),
        }

    def ours(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap}
        if scored:
            found = token_scores(hidden, weight, targets, **options)
            return found.target_logit, found.logsumexp * kept.to(found.logsumexp.dtype), found.loss
        options.update(label_smoothing=smoothing, reduction="none")
        return (linear_cross_entropy(hidden, weight, targets, **options),)

    def plain(hidden: Tensor, weight: Tensor, stored: Any) -> tuple[Tensor, ...]:
        logits = plain_logits(hidden, weight, scale, soft_cap)
        loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        of_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return (
            (of_target * kept.to(loss.dtype), logits.logsumexp(-1) * kept.to(loss.dtype), loss) if scored else (loss,)
        )

    def terms(t: Tensors, results: Tensors) -> Tensors:
        size = scale * (t["hidden"].abs() @ t["weight"].abs().mT).amax(-1)
        size = size.clamp(max=soft_cap) if soft_cap else size
        of = dict.fromkeys(("target_logit", "logsumexp", "loss"), 1 + size)
        if not scored:
            # dz sums up probabilities, each with the relative error of its logit's absolute one, and the target's.
            dz = 2 * scale * (1 + size) * t["dloss"].abs()
            of["dhidden"] = dz[:, None] * t["weight"].abs().amax(0)
            of["dweight"] = (dz[:, None] * t["hidden"].abs()).sum(0).expand(V, D)
        return of

    outputs = ("target_logit", "logsumexp", "loss") if scored else ("loss",)
    trained = () if scored else chosen(draw, "hidden", "weight")
    return Case(tensors, ours, plain, outputs, trained, terms, blocks)


STRATEGIES: dict[str, st.SearchStrategy[Case]] = {
    "rms_norm": norms(rms_norm, plain_rms_norm, False),
    "layer_norm": norms(layer_norm, plain_layer_norm, True),
    "rotary": rotations(),
    "gated_activation": activations(),
    "xielu": xielus(),
    "attention": attentions(),
    "decode_attention": decodings(),
    "linear_cross_entropy": heads(False),
    "token_scores": heads(True),
}
