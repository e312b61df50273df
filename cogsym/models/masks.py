"""What a transformers attention mask says, in the form that the attention operation takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class UnknownMaskError(Exception):
    """The mask is not causal attention from a first visible key on; the message says what it is."""


# One mask serves every layer of a forward pass, and reading it costs a pass over [B, T, T].
_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def first_visible_keys(attention_mask: Any, length: int) -> Tensor | None:
    """The first key that each query sees, every later one up to itself being visible too.

    That covers causal attention, padding on either side, packed documents and sliding windows. A padding token is let
    see itself alone: transformers leaves its output to the attention implementation too, and nothing may use it.

    Args:
        attention_mask: as a transformers model hands it to its layers: None, or [B or 1, 1, T, T], bool (true: visible)
            or floating point (0: visible).
        length: T.

    Returns:
        int32 [B or 1, T], non-decreasing along T; None for plain causal attention.

    Raises:
        UnknownMaskError: any other mask.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise UnknownMaskError("the attention mask is not a [B, 1, T, T] tensor")
    if attention_mask.shape[1] != 1 or attention_mask.shape[2:] != (length, length):
        raise UnknownMaskError(f"the attention mask has shape {tuple(attention_mask.shape)}")
    if attention_mask not in _read:
        _read[attention_mask] = _first_visible_keys(attention_mask[:, 0])
    starts: Tensor | None = _read[attention_mask]
    if starts is None:
        raise UnknownMaskError("the attention mask is not causal attention from a first visible key on")
    return starts


def _first_visible_keys(mask: Tensor) -> Tensor | None:
    """`first_visible_keys` of [B or 1, T, T], or None where there is no such thing."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    place = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32)
    padding = ~visible.diagonal(dim1=-2, dim2=-1)
    starts = torch.where(padding, place, visible.to(torch.uint8).argmax(-1).int())
    expected = (place >= starts[..., None]) & (place <= place[:, None])
    fits = ((visible == expected).all(-1) | padding).all() & (starts.diff(dim=-1) >= 0).all()
    return starts if fits else None
