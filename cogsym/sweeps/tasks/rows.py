"""Rows of data, and templates filled with their columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogsym.data import Document, Source, read_records
from cogsym.data.formats import Record
from cogsym.errors import CogsymError

WAYS = ("without_full_stop", "lower_first")  # in which a column may be written, beside a table


def pieces(template: str) -> list[tuple[str, str | None]]:
    """A template as (literal, column that follows it, or None at the end); one without columns is a literal."""
    return Source(Path("task"), template=template).pieces if "{" in template else [(template, None)]


def fill(template: str, row: Mapping[str, str]) -> str:
    """The template with the columns of a row in it."""
    return "".join(literal + (row[column] if column is not None else "") for literal, column in pieces(template))


def columns_of(*templates: str) -> list[str]:
    """The columns that templates name, each once."""
    named = [column for template in templates for _, column in pieces(template) if column is not None]
    return list(dict.fromkeys(named))


def scored_text(template: str, row: Mapping[str, str], target: str, header: str) -> Document:
    """The header and the template filled, scored from the last place of the column `target`."""
    text, start = header, 0
    for literal, column in pieces(template):
        text += literal
        if column is not None:
            start = len(text) if column == target else start
            text += row[column]
    return Document(text, start)


def digest(*values: Any) -> str:
    """SHA-256 in hexadecimal of values as JSON has them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def read_rows(
    task: str, data: Mapping[str, Source], texts: Sequence[str], others: Sequence[str], ways: Mapping[str, Any]
) -> tuple[list[Record], int]:
    """(The rows of a task's data, columns written as `ways` says; how many with a blank column were left out).

    Args:
        task: its name, for messages.
        data: column -> the file and column it is read from, or "" -> a file of all columns.
        texts: columns of text.
        others: columns that may hold anything.
        ways: column -> one of `WAYS`, or a table of what is written for each of its values.

    Raises:
        CogsymError: a file that cannot be read, a missing column, or files that do not correspond.
    """
    if "" in data:
        path = data[""].path
        read = list(read_records(path, texts, others))
    else:
        read = _joined(task, data, [*texts, *others])
        path = next(iter(data.values())).path
    kept = [(where, row) for where, row in read if all(row[column].strip() for column in texts)]
    if not kept:
        raise CogsymError(f"{path} holds no document of the task {task}, expected rows with text in them.")
    return [
        (where, {c: _written(v, ways.get(c), f"{path}, {where}: column {c!r}") for c, v in row.items()})
        for where, row in kept
    ], len(read) - len(kept)


def _joined(task: str, data: Mapping[str, Source], columns: Iterable[str]) -> list[Record]:
    """Rows of files that correspond line by line; a line that is blank in one of them is blank in the row."""
    rows: dict[str, dict[str, str]] = {}
    last = {}
    for column in columns:
        if column not in data:
            raise CogsymError(f"The data of the task {task} have no column {column!r}, only {', '.join(data)}.")
        source = data[column]
        name = source.fields[0]
        for where, record in read_records(source.path, [name]):
            rows.setdefault(where, dict.fromkeys(columns, ""))[column] = record[name]
            last[source.path] = where
    if len(set(last.values())) > 1:
        ends = " and ".join(f"{path} at {where}" for path, where in last.items())
        raise CogsymError(f"The files of the task {task} do not correspond line by line: they end, {ends}.")
    return list(rows.items())


def _written(value: Any, way: Any, where: str) -> Any:
    if way == "without_full_stop":
        return value.rstrip().removesuffix(".")
    if way == "lower_first":
        return value[:1].lower() + value[1:]
    if isinstance(way, dict):
        if value not in way:
            raise CogsymError(f"{where} is {value!r}, expected one of {', '.join(way)}.")
        return way[value]
    return value
