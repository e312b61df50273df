"""Documents from files of text: a column of them, or a template that columns are put into, each as often as asked."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Literal

import numpy as np

from cogsym.data.formats import DEFAULT_FIELD, decompressing, format_of, open_file, read_records, reader_of
from cogsym.errors import CogsymError

Loss = Literal["all", "target"]

_WEIGHT_SEED = 0  # fixed, so that a fractional weight keeps the same documents in every run


@dataclass(frozen=True, slots=True)
class Document:
    """One stretch of running text that the model reads from its own beginning.

    A line of a .txt file is a document, and so is a row of a table; a document never sees its neighbours. Example: the
    document `Document("Habari za asubuhi.")`, or a translation pair written out as one text,
    `Document("English: Good morning.\\nSwahili: Habari za asubuhi.", target_start=32)`.

    Attributes:
        text: The text, with no separator tokens in it.
        target_start: Character from which the loss counts; 0 counts all of the text.
    """

    text: str
    target_start: int = 0


@dataclass(frozen=True)
class Source:
    """A file or folder of documents, and how to read it.

    The name tells the format: .txt (one document a line, its only field is "text"), .jsonl (one JSON object a line),
    .tsv (the first line names the columns; no quoting), .csv (likewise, with quotes as RFC 4180 has them), .parquet, or
    a folder written by `datasets`' `save_to_disk`. Text may be compressed, as .jsonl.gz. All of it is UTF-8. A line or
    row with a blank field is skipped.

    Plain text, the column named: `Source(Path("news.jsonl"), field="body")`. Sentence pairs through a template, which
    is the text of a document with fields in braces (`{{` and `}}` for literal braces):
    `Source(Path("pairs.tsv"), template="English: {en}\\nSwahili: {sw}")`.

    Chats, of which the assistant's turns are learned: `Source(Path("chats.jsonl"), chat="messages")`, a column of lists
    of messages with "role" and "content", written out by the tokenizer's chat template.

    Attributes:
        path: The file or folder.
        field: The column that holds the text; "text" if neither this, `template` nor `chat` is given.
        template: A document's text with column names in braces. A backslash followed by n, as a shell passes it, means
            a new line.
        weight: How many times the documents are seen in one pass. 2 repeats each of them; 0.5 keeps half of them, drawn
            at random but always the same half; 2.5 does both.
        chat: The column that holds the messages.

    Raises:
        CogsymError: `weight` is not a positive number, two of `field`, `template` and `chat` are given, or `template`
            has no field or cannot be read.
    """

    path: Path
    field: str | None = None
    template: str | None = None
    weight: float = 1.0
    chat: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise CogsymError(f"weight {self.weight:g} of {self.path} is not a positive number, such as 2 or 0.5.")
        if self.template is not None:
            if self.field is not None:
                raise CogsymError(
                    f"{self.path} has both a field ({self.field!r}) and a template; give one, as a template names its "
                    "own fields."
                )
            _parse_template(self.template)
        if self.chat is not None and (self.field is not None or self.template is not None):
            other = "template" if self.field is None else "field"
            raise CogsymError(f"{self.path} has both a chat ({self.chat!r}) and a {other}; give one.")

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read a source as the command line gives it: `PATH`, `PATH#FIELD`, `PATH@WEIGHT` or `PATH#FIELD@WEIGHT`.

        `pairs.tsv#swahili@2` is the column "swahili" of pairs.tsv, every line seen twice. A path that exists exactly as
        written is that path, even if it contains one of the two signs, and so is one with a folder separator after it.

        Raises:
            CogsymError: What follows the last @ is not a positive number.
        """
        if Path(text).exists():
            return cls(Path(text))
        rest, weight = _split_last(text, "@")
        path, field = _split_last(rest, "#")
        try:
            value = 1.0 if weight is None else float(weight)
        except ValueError:
            raise CogsymError(
                f"weight {weight!r} in {text!r} is not a number; write PATH or PATH@WEIGHT, such as swahili.txt@2."
            ) from None
        return cls(Path(path), field=field, weight=value)

    @property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The document's text as (literal, field that follows it, or None at the end)."""
        if self.template is None:
            return [("", self.field or DEFAULT_FIELD)]
        return _parse_template(self.template)

    @property
    def fields(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys(field for _, field in self.pieces if field is not None))


def _split_last(text: str, sign: str) -> tuple[str, str | None]:
    """What stands before the last `sign` and what after it; None where that would cut a folder's name."""
    before, found, after = text.rpartition(sign)
    return (before, after) if found and "/" not in after and "\\" not in after else (text, None)


def read_documents(source: Source, loss: Loss = "all") -> list[Document]:
    """Read all documents of a source, repeated as its weight says.

    Args:
        source: What to read.
        loss: "all" counts the loss on the whole text; "target" counts it from the template's last field to the end, as
            for `English: {en}\\nSwahili: {sw}` on the Swahili sentence alone.

    Raises:
        CogsymError: The source cannot be read as its name and fields say; the message tells the line or row.
    """
    documents = read_once(source, loss)
    return [documents[i] for i in selection(source, len(documents))]


def read_once(source: Source, loss: Loss) -> list[Document]:
    """Read the documents of a source as they stand, whatever its weight; otherwise like `read_documents`."""
    if loss not in ("all", "target"):
        raise ValueError(f'loss is {loss!r}, expected "all" or "target"')
    if loss == "target" and source.template is None:
        raise CogsymError(
            f"{source.path} has no template, so the loss has no target side; give a template whose last field is the "
            'target, such as "English: {en}\\nSwahili: {sw}", or count the loss on all.'
        )
    fields, pieces = source.fields, source.pieces
    documents = [
        _fill(pieces, record, loss)
        for _, record in read_records(source.path, fields)
        if all(record[field].strip() for field in fields)
    ]
    if not documents:
        raise CogsymError(f"{source.path} holds no document; expected at least one line or row with text in it.")
    return documents


def selection(source: Source, num_documents: int) -> np.ndarray:
    """Numbers of the documents that the source's weight asks for, int64 [N]: whole copies first, then the fraction.

    Raises:
        CogsymError: The weight is so small that no document is left.
    """
    copies = int(source.weight)
    rest = round((source.weight - copies) * num_documents)
    subset = np.random.default_rng(_WEIGHT_SEED).permutation(num_documents)[:rest]
    chosen = np.concatenate([np.tile(np.arange(num_documents), copies), np.sort(subset)])
    if not len(chosen):
        raise CogsymError(
            f"weight {source.weight:g} keeps none of the {num_documents:,} documents of {source.path}; give a larger "
            "weight or leave the source out."
        )
    return chosen.astype(np.int64)


def content_digest(source: Source) -> str:
    """SHA-256 of the format and bytes of a source's file, or of all files of its folder, in hexadecimal.

    Raises:
        CogsymError: The path does not exist, cannot be read or has an unknown format.
    """
    reader_of(source.path)
    digest = hashlib.sha256(format_of(source.path).encode())
    files = sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]
    for file in files:
        if file.is_file():
            with open_file(file) as stream, decompressing(file):
                name = file.relative_to(source.path).as_posix()
                digest.update(f"\0{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(Formatter().parse(template.replace("\\n", "\n")))
    except ValueError as error:
        raise CogsymError(
            f"template {template!r} cannot be read ({error}); write fields as {{name}} and literal braces as {{{{ and "
            "}}."
        ) from None
    for _, field, format_spec, conversion in parsed:
        if field == "" or format_spec or conversion:
            raise CogsymError(
                f"template {template!r} has braces that hold no plain field name; write fields as {{name}}."
            )
    if all(field is None for _, field, _, _ in parsed):
        raise CogsymError(
            f'template {template!r} names no field; write fields in braces, such as "English: {{en}}\\nSwahili: '
            '{sw}".'
        )
    return [(literal, field) for literal, field, _, _ in parsed]


def _fill(pieces: Sequence[tuple[str, str | None]], record: Mapping[str, str], loss: Loss) -> Document:
    text, target_start = "", 0
    for literal, field in pieces:
        text += literal
        if field is not None:
            target_start = len(text)
            text += record[field]
    return Document(text, target_start if loss == "target" else 0)
