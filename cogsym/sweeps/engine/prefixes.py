"""Token sequences packed for one pass: what they begin with in common is there once.

Sequences that begin alike - the options of a question, prompts with the same examples before them - share those tokens
as a segment, and go on in segments of their own that see it. All segments lie end to end in one row without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# A beginning that is shared by fewer tokens is computed again: attention of segments without a parent runs on tiles,
# that of the others row by row.
SHORTEST_SHARED = 8
# Below this share of scored positions, states behind which nothing attends exist only there.
_NARROW_BELOW = 0.75

# (configurations, hidden states [states, P, D]): the states that configurations end with, one tuple of them each.
OnEnds = Callable[[list[tuple[int, ...]], Tensor], None]


class _Segment(NamedTuple):
    tokens: Sequence[int]
    parent: int  # index of another segment, -1 for none
    position: int  # of its first token


@dataclass(frozen=True, eq=False)
class PackedPrefixes:
    """Sequences in one row of N tokens, the segments without a parent first.

    Attributes:
        tokens: int64 [N].
        positions: each token's place in its sequence, int64 [N].
        starts: the first token of the segment of each token that has no parent, int32 [N0].
        chains: for each other token its segment and those before it in its sequence, nearest first, as
            (begin, end, position of the begin); int64 [N - N0, M, 3], unused ones 0. The end of a token's own segment
            is the token behind it: it sees no later one.
        places: for each sequence where its tokens are, int64 [length] each.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    chains: Tensor
    places: list[Tensor]

    def ranges(self, window: int | None) -> tuple[Tensor, Tensor]:
        """(begins, ends) of what each token with a parent sees, int64 [N - N0, M] each; see `ops.decode_attention`."""
        begins, ends, first = self.chains.unbind(-1)
        return windowed(begins, ends, first, self.positions[len(self.starts) :], window)

    def ranges_at(self, places: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """(begins, ends) of what the tokens at `places`, int64 [P], see; int64 [P, M] each."""
        begins, ends, first = self.chains_at(places).unbind(-1)
        return windowed(begins, ends, first, self.positions[places], window)

    def chains_at(self, places: Tensor) -> Tensor:
        """`chains` of the tokens at `places`, int64 [P], with a parent or without; int64 [P, M, 3]."""
        roots = len(self.starts)
        chains = torch.zeros(len(places), self.chains.shape[1], 3, dtype=torch.int64)
        root = places < roots
        chains[root, 0, 0] = self.starts[places[root]].long()
        chains[root, 0, 1] = places[root] + 1
        chains[~root] = self.chains[places[~root] - roots]
        return chains


@dataclass(frozen=True)
class Batch:
    """Sequences as an engine takes them.

    Attributes:
        sequences: token ids, none of them empty.
        scored: (sequence, token of it) whose hidden state is wanted, P of them.
    """

    sequences: Sequence[tuple[int, ...]]
    scored: Sequence[tuple[int, int]]

    @cached_property
    def packed(self) -> PackedPrefixes:
        """The sequences in one row."""
        return pack_prefixes(self.sequences)

    @cached_property
    def places(self) -> Tensor:
        """Where the scored tokens are in that row, int64 [P]."""
        return torch.tensor([int(self.packed.places[s][i]) for s, i in self.scored], dtype=torch.int64)

    @property
    def narrow(self) -> bool:
        """Whether it pays to keep some states only at scored positions."""
        return len(self.scored) < _NARROW_BELOW * len(self.packed.tokens)


def windowed(
    begins: Tensor, ends: Tensor, first: Tensor, positions: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """(begins, ends) of what tokens see of segments; a range that ends where it begins is empty.

    Args:
        begins: of the segments, int64 [P, M].
        ends: of the segments, int64 [P, M].
        first: the position of each begin, int64 [P, M].
        positions: of the tokens, int64 [P].
        window: how many tokens each sees at most, itself among them; None is all.
    """
    if window is None:
        return begins, ends
    begins = begins + (positions[:, None] - window + 1 - first).clamp(min=0)
    return begins, torch.maximum(begins, ends)


def pack_prefixes(sequences: Sequence[tuple[int, ...]]) -> PackedPrefixes:
    """Token sequences, none of them empty, in one row."""
    segments: list[_Segment] = []
    paths: list[list[int]] = [[] for _ in sequences]
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    _split(sequences, order, 0, 0, -1, segments, paths)
    roots = [s for s, segment in enumerate(segments) if segment.parent < 0]
    others = [s for s, segment in enumerate(segments) if segment.parent >= 0]
    begin, begins = 0, [0] * len(segments)
    for s in roots + others:
        begins[s] = begin
        begin += len(segments[s].tokens)
    starts = [begins[s] for s in roots for _ in segments[s].tokens]
    chains = [_chain(segments, begins, s) for s in others]
    depth = max(map(len, chains), default=1)
    rows = []
    for s, chain in zip(others, chains, strict=True):
        chain += [(0, 0, 0)] * (depth - len(chain))
        own = torch.tensor(chain).repeat(len(segments[s].tokens), 1, 1)
        own[:, 0, 1] = torch.arange(len(own)) + begins[s] + 1
        rows.append(own)
    laid = roots + others
    return PackedPrefixes(
        tokens=torch.tensor([t for s in laid for t in segments[s].tokens]),
        positions=torch.cat([torch.arange(len(segments[s].tokens)) + segments[s].position for s in laid]),
        starts=torch.tensor(starts, dtype=torch.int32),
        chains=torch.cat(rows) if rows else torch.zeros(0, 1, 3, dtype=torch.int64),
        places=[torch.cat([torch.arange(len(segments[s].tokens)) + begins[s] for s in path]) for path in paths],
    )


def _chain(segments: list[_Segment], begins: list[int], s: int) -> list[tuple[int, int, int]]:
    chain = []
    while s >= 0:
        chain.append((begins[s], begins[s] + len(segments[s].tokens), segments[s].position))
        s = segments[s].parent
    return chain


def _split(
    sequences: Sequence[tuple[int, ...]],
    group: list[int],
    known: int,
    begin: int,
    parent: int,
    segments: list[_Segment],
    paths: list[list[int]],
) -> None:
    """Make the segments of sequences that have their first `known` tokens in common, from token `begin` on.

    `group` is sorted by tokens, so that sequences which begin alike are neighbours.
    """
    first, last = sequences[group[0]], sequences[group[-1]]
    common = known  # as far as the outermost agree, all between them do
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    if len(group) == 1 or first == last or common - begin >= SHORTEST_SHARED:
        if common > begin:
            segments.append(_Segment(first[begin:common], parent, begin))
            parent, begin = len(segments) - 1, common
            for i in group:
                paths[i].append(parent)
        group = [i for i in group if len(sequences[i]) > common]
    ended = [i for i in group if len(sequences[i]) == common]
    for subgroup in ([i] for i in ended):
        _split(sequences, subgroup, common, begin, parent, segments, paths)
    rest = [i for i in group if len(sequences[i]) > common]
    while rest:
        token = sequences[rest[0]][common]
        same = [i for i in rest if sequences[i][common] == token]
        _split(sequences, same, common, begin, parent, segments, paths)
        rest = rest[len(same) :]
