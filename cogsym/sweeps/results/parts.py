"""The files that results lie in: Parquet parts, whole or not there, with checksums, merged as they grow many.

A part's name says which appends it holds and ends in the first digits of the SHA-256 of its bytes:
part-000000-000031-0123456789abcdef.parquet is what 32 appends gave. It is written before those that it was merged from
are removed, and where a kill leaves both, they are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogsym.errors import CogsymError
from cogsym.records import reason, remove_leftovers, write_whole

NAME = pa.dictionary(pa.int32(), pa.string())  # few distinct strings, each in thousands of rows
SCHEMA = pa.schema(
    {
        "model": NAME,
        "revision": NAME,
        "configuration": NAME,
        "direction": NAME,
        "k": pa.int32(),
        "task": NAME,
        "language": NAME,
        "side": NAME,
        "document": NAME,
        "metric": NAME,
        "value": pa.float64(),
        "statistics": pa.list_(pa.float64()),
        "text": pa.string(),
    }
)
_TOGETHER = 32  # so many parts are merged: a row is written log32(parts) times more, and 31 parts stay of each size
_LARGEST = 1 << 22  # bytes of a merged part: opening one of this size takes no time beside reading it
_KEY = b"cogsym"


@dataclass(frozen=True)
class Part:
    """A file of rows.

    Attributes:
        path: the file.
        first: the number of the first append that it holds.
        last: of the last one.
    """

    path: Path
    first: int
    last: int

    @property
    def merges(self) -> int:
        """How many times its rows were merged with others."""
        times, appends = 0, self.last - self.first + 1
        while appends >= _TOGETHER:
            times, appends = times + 1, appends // _TOGETHER
        return times


def list_parts(folder: Path) -> list[Part]:
    """The parts in a folder in the order of writing, without those that were merged into others.

    Raises:
        CogsymError: one of another version is among them.
    """
    return [part for part, whole in _list(folder) if whole is None]


def write_part(
    folder: Path, first: int, last: int, table: pa.Table, key: Mapping[str, Any], check: Callable[[], None]
) -> Part:
    """Write rows, so that they are whole and on the disk, or not there.

    Args:
        folder: of the parts.
        first: the number of the first append among the rows.
        last: of the last one.
        table: the rows.
        key: of the sweep.
        check: raises where the sweep may write no more.

    Raises:
        OSError: they were not written.
    """
    sink = pa.BufferOutputStream()
    # The checksums of pages are for other readers of Parquet; `read_part` looks at that of the whole file.
    pq.write_table(
        table.replace_schema_metadata({_KEY: json.dumps(key)}), sink, compression="zstd", write_page_checksum=True
    )
    content = sink.getvalue().to_pybytes()
    path = folder / f"part-{first:06d}-{last:06d}-{_checksum(content)}.parquet"
    write_whole(path, content, check)
    return Part(path, first, last)


def read_part(part: Part, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part.

    Raises:
        FileNotFoundError: it was merged into another one meanwhile.
        CogsymError: it is damaged, or cannot be read.
    """
    try:
        return _load(part, columns)
    except FileNotFoundError:
        raise
    except (OSError, MemoryError, pa.ArrowException) as error:
        why = reason(error) if isinstance(error, OSError) else str(error).partition("\n")[0] or "out of memory"
        raise CogsymError(
            f"{part.path} cannot be read now ({why}), which is no damage to it; free some memory, or mend what that "
            "says, and try again."
        ) from error


def read_parts(folder: Path, columns: list[str] | None = None) -> list[pa.Table]:
    """The rows of every part in a folder, in the order of writing, also while a sweep writes there.

    Raises:
        CogsymError: one is damaged, or cannot be read.
    """
    while True:
        parts = list_parts(folder)
        try:
            return [read_part(part, columns) for part in parts]
        except FileNotFoundError:
            if parts == list_parts(folder):
                raise


def read_key_of(part: Part) -> dict[str, Any]:
    """The key of the sweep that wrote a part.

    Raises:
        CogsymError: it is damaged, or cannot be read.
    """
    metadata: Mapping[bytes, bytes] = read_part(part, []).schema.metadata
    return json.loads(metadata[_KEY])


def merge(folder: Path, parts: Sequence[Part], key: Mapping[str, Any], check: Callable[[], None]) -> list[Part]:
    """Merge the last parts into one where they are many and small; what fits no disk or memory is left as it is.

    Raises:
        CogsymError: one is damaged.
    """
    merged = [*parts]
    with suppress(OSError, MemoryError, pa.ArrowException):
        while len(last := merged[-_TOGETHER:]) == _TOGETHER and len({part.merges for part in last}) == 1:
            if sum(part.path.stat().st_size for part in last) > _LARGEST:
                break
            table = pa.concat_tables([_load(part) for part in last]).unify_dictionaries().combine_chunks()
            whole = write_part(folder, last[0].first, last[-1].last, table, key, check)
            merged[-_TOGETHER:] = [whole]
            for part in last:
                check()
                part.path.unlink()
    return merged


def clean(folder: Path) -> None:
    """Remove what a kill left behind: parts half written, and parts that were merged into others.

    Raises:
        CogsymError: a part that others were merged into is damaged.
    """
    remove_leftovers(folder / "part-*.parquet")
    for part, whole in _list(folder):
        if whole is not None:
            read_part(whole, [])
            part.path.unlink()


def _list(folder: Path) -> list[tuple[Part, Part | None]]:
    """Every part in the order of writing, and the one that it was merged into."""
    parts = []
    for path in folder.glob("part-*.parquet"):
        numbers = re.fullmatch(r"part-(\d+)-(\d+)-[0-9a-f]{16}\.parquet", path.name)
        if numbers is None:
            raise CogsymError(f"{path} is not a part that this version of cogsym writes; move it out of the folder.")
        parts.append(Part(path, int(numbers[1]), int(numbers[2])))
    listed: list[tuple[Part, Part | None]] = []
    whole: Part | None = None
    for part in sorted(parts, key=lambda part: (part.first, -part.last)):
        merged = whole is not None and part.last <= whole.last
        listed.append((part, whole if merged else None))
        whole = whole if merged else part
    return listed


def _load(part: Part, columns: list[str] | None = None) -> pa.Table:
    content = part.path.read_bytes()
    if _checksum(content) != part.path.stem.rpartition("-")[2]:
        raise CogsymError(
            f"{part.path} is damaged (its bytes are not those that were written); delete it and run the sweep again "
            "with --resume."
        )
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        if not file.schema_arrow.equals(SCHEMA):
            raise CogsymError(
                f"{part.path} is not a part that this version of cogsym writes; move it out of the folder."
            )
        return file.read(columns, use_threads=False)  # a thread takes memory of its own, which may be limited


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
