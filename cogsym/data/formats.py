"""Records from files of text: .txt, .jsonl, .tsv, .csv, any of them compressed as .gz, .parquet and folders that
`datasets` saved."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogsym.errors import CogsymError
from cogsym.records import check_file

Record = tuple[str, Mapping[str, Any]]  # where it stands ("line 7"), and its fields
Reader = Callable[[Path, Sequence[str], Sequence[str]], Iterator[Record]]

DEFAULT_FIELD = "text"
_LONGEST_CELL = 1 << 30  # characters of a CSV file's cell; csv's own limit is 131,072
_ARROW_ROWS = 4096  # rows of a table held as Python strings at a time


def read_records(path: Path, texts: Sequence[str], others: Sequence[str] = ()) -> Iterator[Record]:
    """Read the lines or rows of a file or folder of any format that `Source` names, where each stands with it.

    Args:
        path: What to read.
        texts: Columns that hold strings.
        others: Columns that hold anything.

    Raises:
        CogsymError: The path cannot be read, or a column is not there; the message tells the line or row.
    """
    fields = [*texts, *others]
    for where, record in reader_of(path)(path, fields, texts):
        _require_fields(fields, record, f"{path}, {where},")
        for field in texts:
            require_text(record[field], field, f"{path}, {where}")
        yield where, record


def _require_fields(fields: Sequence[str], available: Mapping[str, Any] | Sequence[str], subject: str) -> None:
    for field in fields:
        if field not in available:
            raise CogsymError(
                f"{subject} has no field {field!r}; the fields there are: {', '.join(map(str, available)) or '(none)'}."
            )


def require_text(value: Any, field: str, where: str) -> None:
    """Refuse what is no text.

    Raises:
        CogsymError: the value is no string, or one that cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise CogsymError(f"{where}: field {field!r} is {kind}, expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = value[error.start].encode("unicode_escape").decode()
        raise CogsymError(
            f"{where}: field {field!r} holds {character}, half of a character that JSON wrote in two; write the file "
            "as UTF-8."
        ) from None


def open_file(path: Path) -> Any:
    """The file, open for reading its bytes, decompressed where its name ends in .gz.

    Raises:
        CogsymError: it cannot be opened.
    """
    try:
        return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise CogsymError(f"{path} cannot be opened: {error.strerror}.") from error


@contextmanager
def decompressing(path: Path) -> Iterator[None]:
    """What reads a file of `open_file`.

    Raises:
        CogsymError: it is not compressed as its name says, or was cut.
    """
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CogsymError(
            f"{path} is not a whole gzip file ({_first_line(error)}); write it again, or name it without .gz."
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank; only a line feed ends a line, U+2028 and the like do not."""
    with open_file(path) as stream, decompressing(path):
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                line = raw.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise CogsymError(
                    f"{path} is not UTF-8: line {number}, byte {error.start + 1} of the line is "
                    f"0x{raw[error.start]:02x}; save the file as UTF-8."
                ) from None
            if line.strip():
                yield number, line


def _read_txt(path: Path, fields: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    for number, line in _lines(path):
        yield f"line {number}", {DEFAULT_FIELD: line}


def _read_jsonl(path: Path, fields: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise CogsymError(f"{path}, line {number} is not JSON ({reason}); expected one object a line.") from None
        if not isinstance(record, dict):
            raise CogsymError(
                f'{path}, line {number} is JSON but not an object; expected one such as {{"{fields[0]}": "..."}}.'
            )
        yield f"line {number}", record


def _read_tsv(path: Path, fields: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    lines = _lines(path)
    _, header = next(lines, (0, ""))
    columns = header.split("\t")
    if header:
        _require_fields(fields, columns, f"{path}, whose first line names the columns,")
    for number, line in lines:
        values = line.split("\t")
        if len(values) != len(columns):
            raise CogsymError(
                f"{path}, line {number} has {len(values)} column(s), expected {len(columns)} as in the first line "
                f"({', '.join(columns)})."
            )
        yield f"line {number}", dict(zip(columns, values, strict=True))


def _read_csv(path: Path, fields: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    """As RFC 4180 has it: commas between, quotes around what holds one, and quotes in it doubled."""
    csv.field_size_limit(_LONGEST_CELL)
    with open_file(path) as stream, decompressing(path):
        rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        try:
            columns = next(rows, [])
            if columns:
                _require_fields(fields, columns, f"{path}, whose first line names the columns,")
            for values in rows:
                if values and len(values) != len(columns):
                    raise CogsymError(
                        f"{path}, line {rows.line_num} has {len(values)} column(s), expected {len(columns)} as in the "
                        f"first line ({', '.join(columns)})."
                    )
                if values:
                    yield f"line {rows.line_num}", dict(zip(columns, values, strict=True))
        except csv.Error as error:
            raise CogsymError(f"{path}, line {rows.line_num} is not CSV ({_first_line(error)}); quote it.") from None
        except UnicodeDecodeError as error:
            raise CogsymError(
                f"{path} is not UTF-8 near line {rows.line_num + 1}: a byte is 0x{error.object[error.start]:02x}; save "
                "the file as UTF-8."
            ) from None


def _read_parquet(path: Path, fields: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
        _require_columns(path, fields, texts, file.schema_arrow)
        yield from _rows(path, file.iter_batches(_ARROW_ROWS, columns=list(fields)))
    except (pa.ArrowException, OSError) as error:
        raise CogsymError(
            f"{path} is not a readable Parquet file ({_first_line(error)}); write it again if it is damaged."
        ) from error


def _read_datasets_folder(path: Path, fields: Sequence[str], texts: Sequence[str]) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise CogsymError(
            f'{path} is a folder, which needs the datasets package to read; run: pip install "cogsym[datasets]".'
        ) from None
    try:
        dataset = datasets.load_from_disk(str(path))
    except (FileNotFoundError, KeyError, TypeError, ValueError, OSError) as error:
        raise CogsymError(
            f"{path} is a folder but not one that datasets' save_to_disk wrote, or a damaged one "
            f"({_first_line(error)})."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        example = path / next(iter(dataset), "train")
        raise CogsymError(
            f"{path} holds the splits {', '.join(dataset)}; give the folder of one of them, such as {example}."
        )
    _require_columns(path, fields, texts, dataset.features.arrow_schema)
    tables = dataset.select_columns(list(fields)).with_format("arrow").iter(_ARROW_ROWS)
    try:
        yield from _rows(path, tables)
    except (pa.ArrowException, OSError) as error:
        raise CogsymError(f"{path} is not read ({_first_line(error)}); save it again if it is damaged.") from error


def _require_columns(path: Path, fields: Sequence[str], texts: Sequence[str], schema: pa.Schema) -> None:
    _require_fields(fields, schema.names, str(path))
    for field in texts:
        kind = schema.field(field).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
            raise CogsymError(f"{path}: field {field!r} is of type {kind}, expected strings.")


def _rows(path: Path, tables: Iterator[pa.RecordBatch | pa.Table]) -> Iterator[Record]:
    number = 0
    for table in tables:
        try:
            records = table.to_pylist()
        except UnicodeDecodeError:
            raise CogsymError(
                f"{path} is not UTF-8 somewhere in rows {number + 1} to {number + table.num_rows}; write it again."
            ) from None
        for record in records:
            number += 1
            yield f"row {number}", record


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


_READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def reader_of(path: Path) -> Reader:
    """The function that reads the path's format.

    Raises:
        CogsymError: it does not exist, is a pipe or a device, or has an unknown format.
    """
    if not path.exists():
        raise CogsymError(f"{path} does not exist; check the path of the text file.")
    for part in path.rglob("*") if path.is_dir() else [path]:
        check_file(part)
    if path.is_dir():
        return _read_datasets_folder
    suffix = format_of(path)
    if suffix not in _READERS:
        raise CogsymError(
            f"{path} has the unknown suffix {suffix!r}; expected {', '.join(_READERS)}, one of text with .gz behind, "
            "or a folder written by datasets' save_to_disk."
        )
    if suffix == ".parquet" != path.suffix.lower():
        raise CogsymError(f"{path} is compressed twice; expected a .parquet file as it is.")
    return _READERS[suffix]


def format_of(path: Path) -> str:
    """The suffix that tells the format, .gz aside."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
