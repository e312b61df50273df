"""Strategies of attention and of decode attention."""

from __future__ import annotations

from typing import Any

import torch
from fuzz_case import Case, Tensors, chosen, sizes, values
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import AttentionOptions, attention, decode_attention


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
