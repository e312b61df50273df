"""Tokenised documents to rows of one length, several documents a row, none seeing another."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cogsym.data.tokens import TokenizedDocuments
from cogsym.errors import CogsymError

IGNORE = -100  # the label that transformers leaves out of the loss
_OPEN_ROWS = 64  # rows that may still take a document; 512 fill sentence data only 0.1 % better


def pack(
    tokenized: TokenizedDocuments | Sequence[TokenizedDocuments], length: int, seed: int | None
) -> "PackedDataset":
    """Pack the documents of one or several sources into rows of `length` tokens.

    For training (`seed` given) a document is [separator] + tokens + [separator]: the first separator gives the first
    token a context, and the last one is the end, which the model learns to predict, but for a chat's: its turns have
    ends of their own. Documents are shuffled by the seed and each put into the fullest open row that has room for it.

    For evaluation (`seed=None`) documents keep their order and have no closing separator, so that the loss is of the
    text itself: every token on which it counts is predicted exactly once, and
    sum of losses / ln 2 / `num_bytes` is bits per byte.

    A document longer than a row is cut. Every further piece begins with the last token of the piece before, as context
    only, so no token goes unpredicted; a piece in which nothing is to be predicted is left out.

    Args:
        tokenized: From `tokenize`; all with the same separator.
        length: Tokens of a row, at least 2.
        seed: Seed of the shuffle, or None to keep the order.

    Raises:
        CogsymError: `length` is below 2, or no document holds a token to predict.
        ValueError: The separators differ.
    """
    parts = [tokenized] if isinstance(tokenized, TokenizedDocuments) else list(tokenized)
    if length < 2:
        raise CogsymError(f"a row of {length} token(s) has nothing to predict; give a length of at least 2.")
    if len({part.separator_id for part in parts}) != 1:
        raise ValueError(f"sources have separators {[part.separator_id for part in parts]}, expected one and the same")
    pieces = _cut(parts, length, seed)
    if not len(pieces.size):
        raise CogsymError("no document holds a token to predict; check the text and the side on which the loss counts.")
    rows = _assign_rows(pieces.size, length, open_rows=1 if seed is None else _OPEN_ROWS)
    return PackedDataset(parts, pieces, rows, length, closing=seed is not None)


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What is packed, int64 [P] each: a document, or a part of one that is longer than a row.

    `begin` and `size` count in the document with its separators.
    """

    part: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    size: np.ndarray

    def take(self, index: np.ndarray) -> "_Pieces":
        return _Pieces(self.part[index], self.document[index], self.begin[index], self.size[index])


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows for a Hugging Face causal language model, built when they are asked for; made by `pack`.

    A row is a dict of int64 tensors [length]:

    - `input_ids`: documents end to end, padded with the separator.
    - `labels`: `input_ids` where the loss counts (the model shifts them by one), else -100: on a document's first
      token, before its target, on what a chat's assistant did not say, and on padding.
    - `position_ids`: count from 0 in every document, and in the padding. Given these, no attention mask and
      `use_cache=False`, transformers lets no document attend to another (`masking_utils.find_packed_sequence_indices`);
      with a cache it does, and says nothing.

    Attributes:
        length: Tokens of a row.
        num_loss_tokens: Labels over all rows that are not -100.
        num_bytes: UTF-8 bytes of the text on which the loss counts.
        num_documents: Documents packed, repetitions counted.
        fill: Share of the rows that is not padding.
    """

    def __init__(
        self, parts: Sequence[TokenizedDocuments], pieces: _Pieces, rows: np.ndarray, length: int, closing: bool
    ) -> None:
        self.length = length
        self._parts = parts
        self._closing = closing
        self._pieces = pieces.take(np.argsort(rows, kind="stable"))
        self._row_starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        self.num_documents = sum(len(part.selection) for part in parts)
        self.num_bytes = sum(int(part.num_bytes[part.selection].sum()) for part in parts)
        self.num_loss_tokens = sum(int(part.num_loss_tokens[part.selection].sum()) for part in parts)
        if closing:
            self.num_loss_tokens += sum(len(part.selection) for part in parts if part.learned is None)
        self.fill = float(pieces.size.sum() / (len(self) * length))

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        input_ids = np.full(self.length, self._parts[0].separator_id, dtype=np.int64)
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        position_ids = np.empty(self.length, dtype=np.int64)
        at = 0
        for p in range(self._row_starts[index], self._row_starts[index + 1]):
            size = int(self._pieces.size[p])
            self._write_piece(p, input_ids[at : at + size], labels[at : at + size])
            position_ids[at : at + size] = np.arange(size)
            at += size
        position_ids[at:] = np.arange(self.length - at)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }

    def _write_piece(self, p: int, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Write piece p into its place [size], which holds separators and -100."""
        part, document = self._parts[self._pieces.part[p]], self._pieces.document[p]
        begin, size = int(self._pieces.begin[p]), len(input_ids)
        tokens = part.tokens[part.offsets[document] : part.offsets[document + 1]]
        # With the opening separator at 0, token t of the document stands at t + 1.
        first, last = max(begin, 1), min(begin + size, len(tokens) + 1)
        input_ids[first - begin : last - begin] = tokens[first - 1 : last - 1]
        counted = max(1, int(part.loss_starts[document]) + 1 - begin)
        labels[counted:] = input_ids[counted:]
        if part.learned is not None:
            learned = part.learned[part.offsets[document] : part.offsets[document + 1]]
            labels[first - begin : last - begin][learned[first - 1 : last - 1] == 0] = IGNORE
            labels[last - begin :] = IGNORE


def _cut(parts: Sequence[TokenizedDocuments], length: int, seed: int | None) -> _Pieces:
    """All pieces that hold something to predict, in the order in which they are packed."""
    part = np.repeat(np.arange(len(parts)), [len(p.selection) for p in parts])
    document = np.concatenate([p.selection for p in parts])
    num_tokens = np.concatenate([np.diff(p.offsets)[p.selection] for p in parts])
    loss_start = np.concatenate([p.loss_starts[p.selection] for p in parts]).astype(np.int64)
    order = np.arange(len(document)) if seed is None else np.random.default_rng(seed).permutation(len(document))

    total = num_tokens[order] + (1 if seed is None else 2)  # with separators
    counts = np.maximum(1, -(-(total - 1) // (length - 1)))
    chosen = np.repeat(order, counts)
    piece = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = piece * (length - 1)
    size = np.minimum(length, np.repeat(total, counts) - begin)
    counted = np.maximum(1, loss_start[chosen] + 1 - begin)
    pieces = _Pieces(part[chosen], document[chosen], begin, size).take(np.flatnonzero(size > counted))
    return pieces.take(np.flatnonzero(_has_learned(parts, pieces)))


def _has_learned(parts: Sequence[TokenizedDocuments], pieces: _Pieces) -> np.ndarray:
    """Whether a piece has tokens that are learned, bool [P]; for those of chats, others are taken to."""
    has = np.ones(len(pieces.size), dtype=bool)
    for p, part in enumerate(parts):
        if part.learned is None:
            continue
        of = pieces.part == p
        offset, end = part.offsets[pieces.document[of]], part.offsets[pieces.document[of] + 1]
        before = np.concatenate([[0], np.cumsum(part.learned, dtype=np.int64)])
        # A piece's first position is context: it predicts the document's tokens from `begin` to `begin + size - 1`.
        first, last = (np.minimum(offset + at, end) for at in (pieces.begin[of], (pieces.begin + pieces.size)[of] - 1))
        has[of] = before[last] > before[first]
    return has


def _assign_rows(sizes: np.ndarray, length: int, open_rows: int) -> np.ndarray:
    """Row of every piece, int64 [P]: the open row with the least room that is enough (best fit), else a new one.

    At most `open_rows` rows are open; a new one beyond that closes the one with the least room. One open row keeps the
    pieces in order.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    opened: list[tuple[int, int]] = []  # (room, row), sorted
    num_rows = 0
    for p, size in enumerate(sizes.tolist()):
        at = bisect_left(opened, (size, 0))
        if at < len(opened):
            room, row = opened.pop(at)
        else:
            room, row = length, num_rows
            num_rows += 1
            if len(opened) == open_rows:
                opened.pop(0)
        rows[p] = row
        if room > size:
            insort(opened, (room - size, row))
    return rows
