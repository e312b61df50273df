"""Documents to token ids, in parallel, kept as flat arrays in one memory-mapped Arrow file."""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from tokenizers import Tokenizer

from cogsym.data.chat import Chat, read_chats, template_of
from cogsym.data.sources import Document, Loss, Source, content_digest, read_once, selection
from cogsym.errors import CogsymError
from cogsym.ranks import rank_here
from cogsym.records import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOLD_OUT_SEED = 0  # fixed, so that what is held out is so in every run
_FORMAT = 2  # part of the cache key: raise it when the meaning of a stored array changes
_BATCH = 2048  # documents handed to the tokenizer's threads at a time, and
_BATCH_CHARACTERS = 1 << 22  # how long they may be together: their encodings take about a hundred bytes a character

_SCHEMA = pa.schema(
    {
        "tokens": pa.large_list(pa.int32()),
        "loss_start": pa.int32(),
        "num_bytes": pa.int64(),
        "learned": pa.large_list(pa.uint8()),
    }
)


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """The tokens of D documents, end to end, without separators.

    Attributes:
        tokens: int32 [total], document d being `tokens[offsets[d]:offsets[d + 1]]`.
        offsets: int64 [D + 1].
        loss_starts: int32 [D], the first token of each document on which the loss counts (0 counts all; the document's
            length counts none of its tokens).
        num_bytes: int64 [D], UTF-8 bytes of the text on which the loss counts.
        selection: int64 [N], the documents to use, in order and repeated as the source's weight says.
        separator_id: The token that stands between documents.
        learned: uint8 [total], 1 for the tokens on which the loss counts, of chats; None where it counts on all from
            `loss_starts` on, and on the separator that ends a document.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    loss_starts: np.ndarray
    num_bytes: np.ndarray
    selection: np.ndarray
    separator_id: int
    learned: np.ndarray | None = None

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """int64 [D], the tokens of each document on which the loss counts."""
        if self.learned is None:
            return np.diff(self.offsets) - self.loss_starts
        return np.diff(np.concatenate([[0], np.cumsum(self.learned, dtype=np.int64)])[self.offsets])


def held_out(documents: TokenizedDocuments, share: float) -> tuple[TokenizedDocuments, TokenizedDocuments]:
    """(The documents without a share of them, that share), at least one in each: a document is in one of the two.

    Which ones is decided by chance that is always the same, so that a share of a source is that of every run.

    Raises:
        CogsymError: there are fewer than two documents.
    """
    chosen = np.unique(documents.selection)
    if len(chosen) < 2:
        raise CogsymError(f"A source has {len(chosen)} document, expected two or more to hold {share:.3g} of them out.")
    number = min(max(1, round(share * len(chosen))), len(chosen) - 1)
    held = np.sort(np.random.default_rng(_HOLD_OUT_SEED).permutation(chosen)[:number])
    rest = documents.selection[~np.isin(documents.selection, held)]
    return replace(documents, selection=rest), replace(documents, selection=held)


def separator_id(tokenizer: "PreTrainedTokenizerBase", separator: str | None = None) -> int:
    """Id of the token that stands between documents: the one named, else the tokenizer's bos, else its eos token.

    Some models separate documents with another token than their bos: SmolLM2 was trained with `<|endoftext|>` though
    its bos is a chat marker, so name it there.

    Raises:
        CogsymError: The named token is not in the vocabulary, or none is named and there is neither bos nor eos.
    """
    if separator is not None:
        vocabulary = tokenizer.get_vocab()
        if separator not in vocabulary:
            raise CogsymError(
                f"separator {separator!r} is not a token of the tokenizer; its special tokens are: "
                f"{', '.join(tokenizer.all_special_tokens) or '(none)'}."
            )
        return vocabulary[separator]
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise CogsymError("the tokenizer has neither a bos nor an eos token; name the token that separates documents.")


def tokenize(
    source: Source | Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    loss: Loss,
    separator_id: int,
    cache_dir: Path | None = None,
    vocab_size: int | None = None,
) -> TokenizedDocuments:
    """Tokenise a source, or documents at hand, without special tokens.

    A token counts in the loss when it covers a character at or after its document's `target_start`: the token
    " Habari" that begins with the blank before the target is the target's first.

    Args:
        source: A source, read and then cached under `cache_dir`; or documents, which are never cached.
        tokenizer: A fast tokenizer of transformers; it is left as it is. `TOKENIZERS_PARALLELISM` and
            `RAYON_NUM_THREADS` rule its threads.
        loss: "all" counts the loss on the whole text, "target" from each document's `target_start`.
        separator_id: The token between documents, from `cogsym.data.separator_id`.
        cache_dir: Folder of the cache; None keeps no cache. A file there holds for one tokenizer, content of the
            source, field, template and loss; it may be deleted at any time, and a damaged one is written anew.
        vocab_size: Rows of the model's embedding; None leaves it unchecked.

    Raises:
        CogsymError: The source cannot be read, the tokenizer is not a fast one, the cache cannot be written, or the
            tokenizer gives ids that the model does not have.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise CogsymError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; the model folder needs a tokenizer.json."
        )
    if vocab_size is not None and max(separator_id, tokenizer.vocab_size - 1) >= vocab_size:
        raise _disagreement(tokenizer, vocab_size)
    # A copy: padding and truncation are state of the tokenizer, and whoever set them may still want them.
    original = tokenizer.backend_tokenizer
    backend = Tokenizer.from_str(original.to_str())
    backend.encode_special_tokens = original.encode_special_tokens
    backend.no_padding()
    backend.no_truncation()

    if isinstance(source, Source):
        batch = _tokenize_source(source, tokenizer, backend, loss, separator_id, cache_dir)
        selected = selection(source, batch.num_rows)
    else:
        batch = _tokenize_documents(source, backend, loss, "documents")
        selected = np.arange(len(source), dtype=np.int64)
    tokens = batch.column("tokens").values.to_numpy()
    if vocab_size is not None and tokens.max(initial=0) >= vocab_size:
        raise _disagreement(tokenizer, vocab_size)
    return TokenizedDocuments(
        tokens=tokens,
        offsets=batch.column("tokens").offsets.to_numpy(),
        loss_starts=batch.column("loss_start").to_numpy(),
        num_bytes=batch.column("num_bytes").to_numpy(),
        selection=selected,
        separator_id=separator_id,
        learned=batch.column("learned").values.to_numpy() if isinstance(source, Source) and source.chat else None,
    )


def _disagreement(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> CogsymError:
    return CogsymError(
        f"tokenizer and model disagree: the tokenizer has {len(tokenizer):,} tokens and gives ids that the model's "
        f"vocabulary of {vocab_size:,} does not have; use the tokenizer that belongs to the model."
    )


def _tokenize_source(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    backend: Tokenizer,
    loss: Loss,
    separator_id: int,
    cache_dir: Path | None,
) -> pa.RecordBatch:
    def tokenized() -> pa.RecordBatch:
        if source.chat:
            return _batch_of_chats(source, list(read_chats(source, tokenizer, separator_id)))
        return _tokenize_documents(read_once(source, loss), backend, loss, source.path.name)

    if cache_dir is None:
        return tokenized()
    how = [source.chat, template_of(tokenizer), separator_id] if source.chat else [source.field, source.template, loss]
    key = json.dumps([_FORMAT, backend.to_str(), content_digest(source), *how])
    file = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.arrow"
    cached = _load(file)
    if cached is None:
        _store(tokenized(), file)
        cached = _load(file)
        if cached is None:
            raise CogsymError(f"{file} was damaged as it was written; check the disk or choose another cache folder.")
    return cached


def _batch_of_chats(source: Source, chats: Sequence[Chat]) -> pa.RecordBatch:
    """One row of `_SCHEMA` a chat."""
    if not chats:
        raise CogsymError(f"{source.path} holds no chat; expected at least one line or row with messages in it.")
    offsets = pa.array(np.cumsum([0, *(len(chat.tokens) for chat in chats)], dtype=np.int64))
    tokens, learned = (np.concatenate([getattr(c, name) for c in chats]) for name in ("tokens", "learned"))
    columns = [
        pa.LargeListArray.from_arrays(offsets, pa.array(tokens)),
        pa.array([int(chat.learned.argmax()) for chat in chats], pa.int32()),
        pa.array([chat.num_bytes for chat in chats], pa.int64()),
        pa.LargeListArray.from_arrays(offsets, pa.array(learned.astype(np.uint8))),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _tokenize_documents(documents: Sequence[Document], backend: Tokenizer, loss: Loss, name: str) -> pa.RecordBatch:
    """One row of `_SCHEMA` a document."""
    lengths = np.zeros(len(documents), dtype=np.int64)
    loss_starts = np.zeros(len(documents), dtype=np.int32)
    num_bytes = np.zeros(len(documents), dtype=np.int64)
    chunks = [np.empty(0, dtype=np.int32)]
    with _progress(len(documents) > _BATCH) as progress:
        task = progress.add_task(f"Tokenising {name}", total=len(documents))
        for begin, batch in _batches(documents):
            targets = [document.target_start if loss == "target" else 0 for document in batch]
            encode = backend.encode_batch if any(targets) else backend.encode_batch_fast  # the latter: no offsets
            encodings = encode([document.text for document in batch], add_special_tokens=False)
            for d, (document, target, encoding) in enumerate(zip(batch, targets, encodings, strict=True), start=begin):
                ids = np.array(encoding.ids, dtype=np.int32)
                chunks.append(ids)
                lengths[d] = len(ids)
                num_bytes[d] = len(document.text[target:].encode())
                if target:
                    ends = (end for _, end in encoding.offsets)
                    loss_starts[d] = next((t for t, end in enumerate(ends) if end > target), len(ids))
            progress.advance(task, len(batch))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(chunks)))
    none = pa.LargeListArray.from_arrays(np.zeros_like(offsets), pa.array([], pa.uint8()))
    return pa.record_batch([tokens, pa.array(loss_starts), pa.array(num_bytes), none], schema=_SCHEMA)


def _batches(documents: Sequence[Document]) -> Iterator[tuple[int, list[Document]]]:
    """Number of the first document, and the documents, of every batch."""
    begin, batch, characters = 0, list[Document](), 0
    for d, document in enumerate(documents):
        if batch and (len(batch) == _BATCH or characters + len(document.text) > _BATCH_CHARACTERS):
            yield begin, batch
            begin, batch, characters = d, [], 0
        batch.append(document)
        characters += len(document.text)
    if batch:
        yield begin, batch


def _checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of the arrays: Arrow itself would not notice a damaged byte."""
    tokens, learned = batch.column("tokens"), batch.column("learned")
    plain = (batch.column("loss_start"), batch.column("num_bytes"))
    checksum = 0
    for array in (tokens.values, tokens.offsets, *plain, learned.values, learned.offsets):
        checksum = zlib.crc32(array.to_numpy(), checksum)
    return checksum


def _store(batch: pa.RecordBatch, file: Path) -> None:
    """Write it, with its checksum."""
    batch = batch.replace_schema_metadata({"crc32": str(_checksum(batch))})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new, new.open("wb") as stream, pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
    except OSError as error:
        raise CogsymError(
            f"the token cache cannot be written to {file.parent} ({error.strerror or error}); free some space or "
            "choose another cache folder."
        ) from error


def _load(file: Path) -> pa.RecordBatch | None:
    """The memory-mapped batch, or None where the file is missing or damaged."""
    if not file.exists():
        return None
    try:
        batch = pa.ipc.open_file(pa.memory_map(os.fspath(file))).get_batch(0)
        batch.validate()
        intact = batch.schema == _SCHEMA and int(batch.schema.metadata[b"crc32"]) == _checksum(batch)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    return batch if intact else None


class _DocumentsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} documents/s")


def _progress(large: bool) -> Progress:
    console = Console(file=sys.stderr)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _DocumentsPerSecond(),
        TimeRemainingColumn(),
        console=console,
        disable=rank_here() > 0 or not (large and console.is_terminal),
    )
