"""Inputs of every operation for `test_fuzz.py`: shapes, options and magnitudes that hypothesis draws.

A strategy yields a `Case`: how its tensors are drawn, the operation, plain PyTorch's own way (as a model would call it,
at any precision, float64 among them), and of what magnitude the terms are that results are sums of, where that is not
the results' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzz_attention import attentions, decodings
from fuzz_case import Case, Tensors, chosen, sizes, values
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import (
    activation,
    gated_activation,
    int8_linear,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rotary,
    token_scores,
    xielu,
)
from cogsym.ops.int8_linear import quantise

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
        stream = t["x"] + t.get("residual", 0)
        h = stream - stream.mean(-1, keepdim=True) if biased else stream
        r = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
        # The mean's rounding, in units of the row's deviation: large where a row's values are nearly equal.
        mean = 1 + r * stream.abs() * biased
        scale = t["weight"].abs() + offset
        dx = (scale * t["dy"].abs() * r * mean).amax(-1, keepdim=True) + t.get("dh", 0)
        dweight = (t["dy"] * (h.abs() + stream.abs() * biased) * r).abs().sum(0)
        of = {"dx": dx, "dresidual": dx, "dweight": dweight, "dbias": t["dy"].abs().sum(0)}
        return {**of, "y": scale * mean + results["y"].abs()} if biased else of

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
    names = ("gate", "up")[: 1 + gated]

    def act(x: Tensor) -> Tensor:
        truth = x.dtype == torch.float64  # in which PyTorch's 1 + erf and 1 + tanh are 0 where the formula is not
        if truth and kind == "gelu":
            return x / 2 * torch.erfc(-x * 0.5**0.5)
        if truth and kind == "gelu_tanh":
            return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
        return PLAIN_ACTIVATIONS[kind](x)

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


# ---------------------------------------------------------------- linear


@st.composite
def linears(draw: Any) -> Case:
    rows, N, K, mixed, biased = (
        draw(sizes(70)),
        draw(sizes(80)),
        draw(sizes(200)),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    make, make_weight, make_dout = values(draw), values(draw), values(draw)

    def tensors() -> Tensors:
        weight = make_weight(N, K)
        weight = weight.bfloat16().double() if mixed else weight  # another type holds it exactly
        return {"x": make(rows, K), "weight": weight, **({"bias": make(N)} if biased else {}), "dy": make_dout(rows, N)}

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        other = torch.bfloat16 if x.dtype == torch.float32 else torch.float32
        return (linear(x, weight.to(other) if mixed else weight, bias),)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, stored: Any = None) -> tuple[Tensor, ...]:
        return (F.linear(x, weight, bias),)

    def terms(t: Tensors, results: Tensors) -> Tensors:
        x, weight, dy = (t[name].abs() for name in ("x", "weight", "dy"))
        y = F.linear(x, weight, t["bias"].abs() if biased else None)
        return {"y": y, "dx": dy @ weight, "dweight": dy.T @ x, "dbias": dy.sum(0)}

    return Case(tensors, ours, plain, ("y",), chosen(draw, "x", *["weight"] * (not mixed), *["bias"] * biased), terms)


@st.composite
def int8_linears(draw: Any) -> Case:
    rows, N, K, biased = draw(sizes(70)), draw(sizes(80)), draw(sizes(200)), draw(st.booleans())
    make, make_weight, make_dout = values(draw), values(draw), values(draw)
    weight, scale = quantise(make_weight(N, K))
    wide = weight.double() * scale.double()[:, None]

    def tensors() -> Tensors:
        return {"x": make(rows, K), **({"bias": make(N)} if biased else {}), "dy": make_dout(rows, N)}

    def ours(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return (int8_linear(x, weight, scale, bias),)

    def plain(x: Tensor, bias: Tensor | None = None, stored: Any = None) -> tuple[Tensor, ...]:
        return (F.linear(x, wide.to(x.dtype), bias),)

    def terms(t: Tensors, results: Tensors) -> Tensors:
        x, dy = t["x"].abs(), t["dy"].abs()
        return {
            "y": F.linear(x, wide.abs(), t["bias"].abs() if biased else None),
            "dx": dy @ wide.abs(),
            "dbias": dy.sum(0),
        }

    return Case(tensors, ours, plain, ("y",), chosen(draw, "x", *["bias"] * biased), terms)


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
    "int8_linear": int8_linears(),
    "linear": linears(),
    "attention": attentions(),
    "decode_attention": decodings(),
    "linear_cross_entropy": heads(False),
    "token_scores": heads(True),
}
