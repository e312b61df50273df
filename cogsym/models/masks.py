"""What a transformers attention mask says, in the form that the attention operation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class UnknownMaskError(Exception):
    """The mask is not causal attention from a first visible key on; the message says what it is."""


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees.

    Attributes:
        starts: the first one, every later one up to the query itself being visible too; int32 [B or 1, T],
            non-decreasing along T. None: the first of all.
        blind: queries that see nothing and whose attention is 0, bool [B or 1, T, 1, 1]. None: none are.
    """

    starts: Tensor | None = None
    blind: Tensor | None = None


# One mask serves every layer of a forward pass, and reading it costs a pass over [B, T, T].
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def visible_keys(attention_mask: Any, length: int) -> Visible:
    """What a mask of causal attention lets each query see: with padding, packed documents, sliding windows.

    A padding token that sees tokens before it, on the right of its row, is let see itself alone instead: attention
    implementations differ in what they give it, and no loss may use it. One that sees nothing, on the left of its row,
    gets 0 as from PyTorch: the loss of the first token behind it depends on it.

    Args:
        attention_mask: as a transformers model hands it to its layers: None, or [B or 1, 1, T, T], bool (true: visible)
            or floating point (0: visible).
        length: T.

    Raises:
        UnknownMaskError: any other mask.
    """
    if attention_mask is None:
        return Visible()
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise UnknownMaskError("the attention mask is not a [B, 1, T, T] tensor")
    if attention_mask.shape[1] != 1 or attention_mask.shape[2:] != (length, length):
        raise UnknownMaskError(f"the attention mask has shape {tuple(attention_mask.shape)}")
    if attention_mask not in _read:
        _read[attention_mask] = _visible_keys(attention_mask[:, 0])
    visible: Visible | None = _read[attention_mask]
    if visible is None:
        raise UnknownMaskError("the attention mask is not causal attention from a first visible key on")
    return visible


def _visible_keys(mask: Tensor) -> Visible | None:
    """`visible_keys` of [B or 1, T, T], or None where a query sees something else."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    place = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32)
    padding, blind = ~visible.diagonal(dim1=-2, dim2=-1), ~visible.any(-1)
    if mask.dtype != torch.bool and blind.any():
        return None  # a softmax over finite values spreads over every key
    starts = torch.where(padding, place, visible.to(torch.uint8).argmax(-1).int())
    expected = (place >= starts[..., None]) & (place <= place[:, None])
    fits = ((visible == expected).all(-1) | padding).all() & (starts.diff(dim=-1) >= 0).all()
    return Visible(starts, blind[..., None, None] if blind.any() else None) if fits else None
