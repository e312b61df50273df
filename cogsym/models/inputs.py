"""What a decoder layer is called with besides the residual stream, in the form that our attention takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Positions(NamedTuple):
    """Where the tokens of a batch stand.

    Attributes:
        cos: [B or 1, T, R/2], one column a rotated pair; None where nothing is rotated.
        sin: like `cos`.
        starts: the first key that each query sees, int32 [B, T]; None for the first of all.
        blind: queries whose attention is 0, bool [B or 1, T, 1, 1]; None where there are none.
        query_scale: factors of the queries, [B or 1, T, 1, 1]; None where all are 1.
    """

    cos: Tensor | None
    sin: Tensor | None
    starts: Tensor | None = None
    blind: Tensor | None = None
    query_scale: Tensor | None = None


@dataclass(eq=False)
class LayerInputs:
    """The keywords of one call of a layer.

    Attributes:
        keywords: as transformers gave them.
        positions: what our attention makes of them; None where the model's own implementation must attend.
    """

    keywords: dict[str, Any] = field(default_factory=dict)
    positions: Positions | None = None

    @property
    def attention_mask(self) -> Any:
        """As the model made it for its attention implementation."""
        return self.keywords.get("attention_mask")

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        """cos and sin, [B or 1, T, R] each."""
        return self.keywords.get("position_embeddings")

    @property
    def cache(self) -> Any | None:
        """A transformers cache, updated in place."""
        return self.keywords.get("past_key_values")


# Every layer of a forward pass is given the same tables and positions; strided tables would be copied at each use.
_cut: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_scales: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Rotary:
    """How a model rotates queries and keys, and lays out the tables for it.

    Attributes:
        interleaved: a pair is two neighbours; else a column of the first half and one of the second.
        repeated: how the tables of R columns hold R/2 different ones: the second "half" repeats the first, each stands
            twice beside itself ("pairs"), or there are only R/2 columns ("once").
    """

    interleaved: bool = False
    repeated: Literal["half", "pairs", "once"] = "half"

    def tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin with one column a pair, [B or 1, T, R/2] each."""
        cos, sin = position_embeddings
        return self._once(cos), self._once(sin)

    def _once(self, table: Tensor) -> Tensor:
        if self.repeated == "once":
            return table
        if self.repeated == "half":
            return table[..., : table.shape[-1] // 2]
        if torch.compiler.is_compiling():
            return table[..., ::2]
        if table not in _cut:
            _cut[table] = table[..., ::2].contiguous()
        cut: Tensor = _cut[table]
        return cut


@dataclass(frozen=True)
class QueryScale:
    """How queries grow with their position: 1 + β log(1 + ⌊position / length⌋), so that long texts stay sharp.

    Source: Llama 4, "temperature tuning"; Ministral 3.

    Attributes:
        beta: β.
        length: positions that are left as they are.
    """

    beta: float
    length: int

    def __call__(self, positions: Tensor) -> Tensor:
        """The factors, float32 [..., 1, 1], of positions [...]."""
        return (1 + self.beta * torch.log(1 + torch.floor(positions / self.length)))[..., None, None]

    def where_needed(self, positions: Tensor) -> Tensor | None:
        """The same, or None where all are 1; for positions that all layers of a forward pass are given."""
        if torch.compiler.is_compiling():
            return self(positions)
        if positions not in _scales:
            _scales[positions] = self(positions) if (positions >= self.length).any() else None
        factors: Tensor | None = _scales[positions]
        return factors
