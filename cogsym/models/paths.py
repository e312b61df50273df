"""Which way a decoder layer runs, in the words that `explain` and a sweep share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cogsym import ops
from cogsym.models.block import Block
from cogsym.models.norm import ModuleNorm
from cogsym.ops import Route

OWN = "own forward"


def routes(block: Block, device: torch.device, dtype: torch.dtype) -> list[dict[str, Route]]:
    """Where the operations of its attention and of its MLP go, by name."""
    return [
        {name: ops.route(name, device, dtype, **facts) for name, facts in half.operations().items()}
        for half in block.halves
    ]


def half_path(of_half: dict[str, Route]) -> str:
    """A half's path in a word: the backend of its first operation."""
    return next((route.backend for route in of_half.values()), OWN)


def in_one_word(attention: str, mlp: str) -> str:
    """Both halves' path, in one word where they have the same."""
    return attention if attention == mlp else f"attention {attention}, MLP {mlp}"


def norm_reasons(block: Block) -> list[str]:
    """Why norms run their own forward, each reason once."""
    norms = [norm for half in block.halves for norm in (half.norm, half.output_norm)]
    reasons = [f"a norm by its own forward: {norm.reason}" for norm in norms if isinstance(norm, ModuleNorm)]
    return list(dict.fromkeys(reasons))


def by_spans(texts: Sequence[str]) -> list[str]:
    """A line for each run of neighbouring layers of which the same is said; an empty text gives none."""
    lines, start = [], 0
    for end in range(1, len(texts) + 1):
        if end < len(texts) and texts[end] == texts[start]:
            continue
        if texts[start]:
            lines.append(f"layer{f' {start}' if end - start == 1 else f's {start}-{end - 1}'}: {texts[start]}")
        start = end
    return lines


def own_forwards(
    blocks: Sequence[Block | None], reasons: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[str]:
    """A line for each run of layers that, or a part of which, run their own forward in a sweep.

    Args:
        blocks: of each layer.
        reasons: why all of them do, where they do.
        device: of the weights.
        dtype: likewise.
    """
    if reasons:
        return by_spans([f"{OWN}, a state at a time ({'; '.join(reasons)})"] * len(blocks))
    texts = []
    for block in blocks:
        assert block is not None
        why = [*filter(None, (half.reason for half in block.halves)), *norm_reasons(block)]
        path = in_one_word(*map(half_path, routes(block, device, dtype)))
        texts.append(f"{path} ({'; '.join(why)})" if why else "")
    return by_spans(texts)
