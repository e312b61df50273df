"""What attention is told, and which queries, keys and values it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogsym.ops.checks import check_floating, check_like


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What attention is told besides queries, keys and values.

    Attributes:
        scale: what q · k is multiplied by; usually D ** -0.5.
        starts: the first key that each query sees, int32 [B, T], non-decreasing along T, starts[b, t] <= t: the first
            position of the query's document in a packed sequence, or the first after left padding. None is 0.
        window: how many keys a query sees at most, itself among them; None is all.
        soft_cap: bound of the logits; None is none.
        sinks: a logit of each query head, [H], floating point; None is none.

    Raises:
        ValueError: a window or soft cap that is not positive.
        TypeError: `starts` not int32.
    """

    scale: float
    starts: Tensor | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.starts is not None and self.starts.dtype != torch.int32:
            raise TypeError(f"attention: starts has dtype {self.starts.dtype}, expected torch.int32.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention: window is {self.window}, expected at least 1; a query sees itself.")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"attention: soft_cap is {self.soft_cap}, expected a positive bound.")


def starts_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """`starts` of sequences packed one behind the other.

    Args:
        cu_seqlens: cumulative lengths, [N + 1], integers: 0, the end of the first sequence, ..., T.

    Returns:
        int32 [1, T]: for each position the place where its sequence begins.
    """
    begins, lengths = cu_seqlens[:-1].to(torch.int32), cu_seqlens.diff()
    return torch.repeat_interleave(begins, lengths).unsqueeze(0)


def check(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, sinks: Tensor | None, *rest: Any) -> None:
    """Of the forward pass, all that is known without looking at values."""
    shape, of_keys = q.shape, k.shape
    if len(shape) != 4:
        raise ValueError(f"attention: q has shape {tuple(shape)}, expected [B, T, H, D].")
    B, T, H, D = shape
    if of_keys != v.shape or len(of_keys) != 4 or (of_keys[0], of_keys[1], of_keys[3]) != (B, T, D):
        raise ValueError(
            f"attention: k has shape {tuple(of_keys)} and v {tuple(v.shape)}, expected both [{B}, {T}, KV, {D}] to "
            "match q."
        )
    check_heads("attention", H, of_keys[2], q, k, v, sinks)
    if starts is not None:
        if starts.shape != (B, T):
            raise ValueError(f"attention: starts has shape {tuple(starts.shape)}, expected ({B}, {T}) to match q.")
        if starts.dtype is not torch.int32:
            raise TypeError(f"attention: starts has dtype {starts.dtype}, expected torch.int32.")


def check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, starts: Tensor | None, *rest: Any
) -> None:
    """Of the backward pass, likewise."""
    check(q, k, v, starts, None)
    check_like("attention", "q", q, ("dout", dout), ("o", o))
    B, T, H, _ = q.shape
    if lse.shape != (B, H, T):
        raise ValueError(f"attention: lse has shape {tuple(lse.shape)}, expected {(B, H, T)} to match q.")
    expected = torch.float64 if q.dtype is torch.float64 else torch.float32
    if lse.dtype is not expected:
        raise TypeError(f"attention: lse has dtype {lse.dtype}, expected {expected} to match q.")


def check_heads(operation: str, heads: int, kv: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Refuse so many heads of queries, and of keys and values, that do not belong together.

    Raises:
        ValueError: their numbers do not.
        TypeError: their dtypes do not, or are not floating point.
    """
    if kv == 0 or heads % kv:
        raise ValueError(f"{operation}: q has {heads} heads and k {kv}, expected a multiple.")
    dtype = q.dtype
    if k.dtype is not dtype or v.dtype is not dtype:
        raise TypeError(f"{operation}: q, k and v have dtypes {dtype}, {k.dtype} and {v.dtype}, expected one.")
    if not dtype.is_floating_point:
        check_floating(operation, "q", q)
    if sinks is not None:
        if sinks.shape != (heads,):
            raise ValueError(
                f"{operation}: sinks has shape {tuple(sinks.shape)}, expected ({heads},), one a query head."
            )
        check_floating(operation, "sinks", sinks)


def check_starts(starts: Tensor | None) -> None:
    """Values are looked at within the operation: before it, torch.compile would have to break its graph for them."""
    if starts is None or not starts.numel():
        return
    place = torch.arange(starts.shape[1], device=starts.device)
    outside = (starts < 0) | (starts > place)
    if outside.any():
        b, t = outside.nonzero()[0].tolist()
        raise ValueError(
            f"attention: starts of query {t} in row {b} is {int(starts[b, t])}, expected 0 to {t}; a query sees itself."
        )
    if (starts.diff(dim=1) < 0).any():
        raise ValueError("attention: starts decrease along a row, expected them to stay or rise.")
