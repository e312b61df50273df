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
    if torch.compiler.is_compiling():
        raise UnknownMaskError("a compiled graph cannot depend on what a mask holds")
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


def mask_ahead(
    attention_mask: Any, position_ids: Any, length: int, device: torch.device, blind_queries: bool
) -> Tensor | None:
    """What a decoder may be given in the place of the mask that it would make, for layers that read `visible_keys`.

    transformers hands a mask of four dimensions on as it is. This one has no elements, where its own has T x T for each
    row; `visible_keys` knows what it stands for. On a GPU one number is waited for, none where there is nothing to see.

    Args:
        attention_mask: as a decoder takes it: None, or [B, T], 0 for padding.
        position_ids: likewise, [B or 1, T]; where they do not go on by 1 and there is no mask, a document begins.
        length: T.
        device: of the states.
        blind_queries: whether padding that sees nothing may have an attention of 0.

    Returns:
        [0, 1, T, T]; None where a mask has to say it.
    """
    place = torch.arange(length, device=device, dtype=torch.int32)
    if attention_mask is None and position_ids is None:
        visible = Visible()
    elif attention_mask is None:
        if position_ids.dim() != 2 or position_ids.shape[1] != length:
            return None
        begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
        starts = torch.where(begins, place, 0).cummax(-1).values
        visible = Visible(starts if begins.any() else None)
    else:
        if attention_mask.dim() != 2 or attention_mask.shape[1] != length:
            return None
        there = attention_mask.to(device, torch.bool)
        count = there.cumsum(-1, dtype=torch.int32)
        blind = count == 0
        first = blind.sum(-1, keepdim=True, dtype=torch.int32)
        without_holes = (~there | (count == place - first + 1)).all()
        whole, fits, some_blind = torch.stack([there.all(), without_holes, blind.any()]).tolist()
        if not fits or (some_blind and not blind_queries):
            return None
        visible = Visible(
            None if whole else torch.where(there, first, place), blind[..., None, None] if some_blind else None
        )
    stand_in = place.new_empty(0, 1, length, length)
    _read[stand_in] = visible
    return stand_in


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
