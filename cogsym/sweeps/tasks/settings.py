"""What a task is, as a user writes it: settings in a small file, checked here, and the rows of its data.

A task file is YAML or JSON, and a built-in task is one that comes with the package:

    kind: translation                               # choice, text or translation
    side: production                                # or perception
    language: sw                                    # what the task is about, ISO 639
    data: pairs.jsonl                               # .txt, .jsonl, .tsv, .parquet or a folder written by `datasets`
    template: "English: {en}\\nSwahili: {sw}"        # braces name columns

A path in a file is relative to that file, a path on the command line to the working directory. The command line names a
task, its data if it has none, and any setting that is to be another:

    text:news.jsonl#sw,language=sw                  # column "sw" of news.jsonl
    xcopa-sw:sw.test.jsonl,limit=100
    my_task.yaml,shots=2,metrics=[bits_per_byte]

The kinds, and what the model is asked:

    text          How likely is the text? `template` is "{text}" unless given; data may be PATH#COLUMN.
    translation   How likely is the last column of the template after what stands before it, and what would the model
                  write there? Asked to write only if one of the metrics needs it.
    choice        Which option is the likeliest in the place of {option}, with all that follows? `options` are
                  templates; `label` is the column of the right one, as named in `labels` (0, 1, ... unless given).

Further settings:

    name              in results; else the file's name with the data's
    output_language   of what is scored and written, where it is not `language`
    metrics           of `METRICS`, those that are wanted; all of the kind unless given, but for log_likelihood and
                      accuracy_per_byte
    write             how a column is written: without_full_stop, lower_first, or a table such as {cause: because}
    shots             so many first rows are examples that stand before each question, and are not asked
    limit             so many documents, the first ones; all unless given
    stops             an answer ends before the first of these; a new line unless given
    max_new_tokens    an answer is cut after so many; 128 unless given
    separator         the token before each document; the tokenizer's bos or eos unless given

Data in files that correspond line by line, as FLORES and NTREX come: `data: {en: eng.txt, sw: swa.jsonl#text}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cogsym.data import Source, read_records
from cogsym.data.formats import Record
from cogsym.errors import CogsymError
from cogsym.sweeps import user_files

GENERATION_METRICS = ("chrf++", "bleu", "language", "empty", "repeated", "cut")


class _Kind(NamedTuple):
    """What is a kind's own: its metrics, those it has unless told, its settings, and its side."""

    metrics: tuple[str, ...]
    default: tuple[str, ...]
    settings: tuple[str, ...]
    side: str  # "" where it must be said


_LIKELIHOOD = ("bits_per_byte", "log_likelihood")
_KINDS = {
    "choice": _Kind(
        ("accuracy", "accuracy_per_byte", "margin"),
        ("accuracy", "margin"),
        ("options", "label", "labels", "shots"),
        "perception",
    ),
    "text": _Kind(_LIKELIHOOD, ("bits_per_byte",), (), "production"),
    "translation": _Kind(
        (*_LIKELIHOOD, *GENERATION_METRICS),
        ("bits_per_byte", *GENERATION_METRICS),
        ("output_language", "shots", "stops", "max_new_tokens"),
        "",
    ),
}
_SIDES = ("perception", "production")
_WAYS = ("without_full_stop", "lower_first")
OPTION = "option"  # stands in a template for each of the options
_BUILTIN = {path.stem: path for path in sorted((Path(__file__).parent / "builtin").glob("*.yaml"))}


@dataclass(frozen=True)
class Settings:
    """The settings of a task, as the head of this module tells.

    Attributes:
        data: column -> the file and column it is read from, or "" -> a file of all columns.
    """

    name: str
    kind: str
    data: Mapping[str, Source]
    template: str = "{text}"
    side: str = ""
    language: str = "und"  # ISO 639: undetermined
    output_language: str = ""
    options: tuple[str, ...] = ()
    label: str = "label"
    labels: tuple[str, ...] = ()
    write: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    shots: int = 0
    stops: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 128
    limit: int | None = None
    separator: str | None = None


_NAMES = [f.name for f in fields(Settings)]
_NUMBERS = {"shots": 0, "max_new_tokens": 1, "limit": 1}  # and the least of each
_LISTS = ("options", "labels", "metrics", "stops")
_Given = dict[str, Any]


def load_settings(what: str | Path | Mapping[str, Any], separator: str | None = None) -> Settings:
    """The settings of a task from what a user writes.

    Args:
        what: a task as the command line names it, or its settings, with paths relative to the working directory.
        separator: the token before each document, where the task does not name one.

    Raises:
        CogsymError: an unknown task, setting, kind or metric, or a value that it cannot have.
    """
    if isinstance(what, Mapping):
        given, folder = dict(what), Path()
    else:
        given, folder = _named(str(what))
    given.setdefault("name", "task")
    if separator is not None:
        given.setdefault("separator", separator)
    where = f"task {given['name']}"
    for name, value in given.items():
        given[name] = _checked(name, value, where)
    kind = given.get("kind")
    if kind not in _KINDS:
        raise CogsymError(f"The kind {kind!r} of {where} is unknown, expected one of {', '.join(_KINDS)}.")
    for name in given:
        owners = [other for other in _KINDS if name in _KINDS[other].settings]
        if owners and kind not in owners:
            raise CogsymError(f"The setting {name} of {where} is for the kind {' or '.join(owners)}, not for {kind}.")
    given["data"], given["template"] = _data(given, folder, where)
    given.setdefault("side", _KINDS[kind].side)
    given["metrics"] = tuple(dict.fromkeys(given.get("metrics") or _KINDS[kind].default))
    given["output_language"] = given.get("output_language") or given.get("language", Settings.language)
    if kind == "choice":
        given["labels"] = given.get("labels") or tuple(map(str, range(len(given.get("options", ())))))
    settings = Settings(**given)
    _check(settings, where)
    return settings


def _named(text: str) -> tuple[_Given, Path]:
    """The settings that "xcopa-sw:sw.test.jsonl,limit=100" and the like stand for, and the folder of their paths."""
    task, *changes = re.split(r",(?=\w+=)", text)
    word, data = (task, "") if Path(task).exists() else task.partition(":")[::2]
    path = _BUILTIN.get(word, Path(word).expanduser())
    if path.suffix not in user_files.SUFFIXES:
        raise CogsymError(
            f"The task {word!r} is unknown, expected one of {', '.join(_BUILTIN)}, or a file that ends in "
            f"{', '.join(user_files.SUFFIXES)}."
        )
    given = _read(path)
    for change in changes:
        name, _, value = change.partition("=")
        given[name] = _typed(name, value)
        data = value if name == "data" else data
    if data:
        given["data"] = data
    given.setdefault("name", path.stem + (f":{Path(data).name}" if data else ""))
    return given, Path() if data else path.parent


def _read(path: Path) -> _Given:
    given = user_files.read(path)
    if not isinstance(given, dict):
        raise CogsymError(
            f"{path} holds a {type(given).__name__}, expected the settings of a task, such as kind: text."
        )
    return given


def _typed(name: str, value: str) -> Any:
    """The value of a setting on the command line."""
    if name not in _NUMBERS and name not in _LISTS and name != "write":
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return [read] if name in _LISTS and not isinstance(read, list) else read


def _checked(name: str, value: Any, where: str) -> Any:
    """The value if it is of the type that the setting has."""
    if name not in _NAMES:
        raise CogsymError(f"The setting {name!r} of {where} is unknown, expected some of {', '.join(_NAMES)}.")
    if name in _NUMBERS:
        fits, expected = type(value) is int and value >= _NUMBERS[name], f"a whole number from {_NUMBERS[name]}"
    elif name == "labels":
        fits, expected = isinstance(value, list), "a list such as [0, 1]"
        value = tuple(map(str, value)) if fits else value
    elif name in _LISTS:
        fits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        value, expected = tuple(value) if fits else value, "a list of texts"
    elif name == "write":
        fits, expected = isinstance(value, dict), "columns, and how each is written"
        if fits:
            value = {
                str(column): {str(k): str(v) for k, v in way.items()} if isinstance(way, dict) else way
                for column, way in value.items()
            }
    else:
        fits = isinstance(value, str) or (name == "data" and isinstance(value, (Path, dict)))
        expected = "a text; put it in quotes"
    if not fits:
        raise CogsymError(f"The setting {name} of {where} is {value!r}, expected {expected}.")
    return value


def _data(given: _Given, folder: Path, where: str) -> tuple[dict[str, Source], str]:
    """(The files by column, the template)."""
    data, template = given.get("data"), given.get("template", "")
    if not data:
        raise CogsymError(f"The {where} names no data; write the file after it, as in {given['name']}:FILE.")
    parts = {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {"": str(data)}
    sources = {column: Source.parse(str(folder / Path(part).expanduser())) for column, part in parts.items()}
    for source in sources.values():
        if source.weight != 1:
            raise CogsymError(f"The data of {where} have the weight {source.weight:g}, but a task reads them once.")
    whole = sources.get("")
    if given["kind"] == "text":
        return sources, template or f"{{{whole.field if whole and whole.field else 'text'}}}"
    if whole and whole.field:
        raise CogsymError(
            f"The data of {where} name the column {whole.field!r}, but the template names the columns of a "
            f"{given['kind']}; write the file alone."
        )
    if not template:
        raise CogsymError(f'The {where} has no template, such as "English: {{en}}\\nSwahili: {{sw}}".')
    return sources, template


def _check(settings: Settings, where: str) -> None:
    if settings.side not in _SIDES:
        raise CogsymError(f"The side {settings.side!r} of {where} is unknown, expected {' or '.join(_SIDES)}.")
    known = _KINDS[settings.kind].metrics
    for metric in settings.metrics:
        if metric not in known:
            raise CogsymError(
                f"The metric {metric!r} of {where} is unknown for the kind {settings.kind}, expected some of "
                f"{', '.join(known)}."
            )
    columns = columns_of(settings)
    placed = [column for _, column in pieces(settings.template)]
    if settings.kind == "choice":
        if placed.count(OPTION) != 1 or len(settings.options) < 2:
            raise CogsymError(
                f"The {where} is a choice, expected one {{option}} in its template and two options or more."
            )
        if len(settings.labels) != len(settings.options):
            raise CogsymError(
                f"The {where} has {len(settings.labels)} labels for {len(settings.options)} options, expected one each."
            )
    elif settings.kind == "translation" and len(columns) < 2:
        raise CogsymError(
            f"The template {settings.template!r} of {where} needs two columns, such as "
            '"English: {en}\\nSwahili: {sw}".'
        )
    for column, way in settings.write.items():
        if column not in columns:
            raise CogsymError(f"The {where} writes the column {column!r}, which none of its templates names.")
        if way not in _WAYS and not isinstance(way, dict):
            raise CogsymError(
                f"The column {column!r} of {where} is written {way!r}, expected {', '.join(_WAYS)} or a table such as "
                "{cause: because}."
            )


def pieces(template: str) -> list[tuple[str, str | None]]:
    """A template as (literal, column that follows it, or None at the end); one without columns is a literal."""
    return Source(Path("task"), template=template).pieces if "{" in template else [(template, None)]


def fill(template: str, record: Mapping[str, str]) -> str:
    """The template with the columns of a row in it."""
    return "".join(literal + (record[column] if column is not None else "") for literal, column in pieces(template))


def columns_of(settings: Settings) -> list[str]:
    """The columns of text that the templates name, each once."""
    named = [column for template in (settings.template, *settings.options) for _, column in pieces(template)]
    return list(dict.fromkeys(column for column in named if column not in (None, OPTION)))


def read_rows(settings: Settings) -> tuple[list[Record], int]:
    """(The rows of the data, columns written as the settings say; how many with a blank column were left out).

    Raises:
        CogsymError: a file that cannot be read, a missing column, or files that do not correspond.
    """
    columns = columns_of(settings)
    labels = [settings.label] if settings.kind == "choice" else []
    if "" in settings.data:
        path = settings.data[""].path
        read = list(read_records(path, columns, labels))
    else:
        read = _joined(settings, [*columns, *labels])
        path = next(iter(settings.data.values())).path
    kept = [(where, record) for where, record in read if all(record[column].strip() for column in columns)]
    if not kept:
        raise CogsymError(f"{path} holds no document of the task {settings.name}, expected rows with text in them.")
    ways = settings.write
    return [
        (where, {c: _written(v, ways.get(c), f"{path}, {where}: column {c!r}") for c, v in record.items()})
        for where, record in kept
    ], len(read) - len(kept)


def _joined(settings: Settings, columns: list[str]) -> list[Record]:
    """Rows of files that correspond line by line; a line that is blank in one of them is blank in the row."""
    rows: dict[str, dict[str, str]] = {}
    last = {}
    for column in columns:
        if column not in settings.data:
            raise CogsymError(
                f"The data of the task {settings.name} have no column {column!r}, only {', '.join(settings.data)}."
            )
        source = settings.data[column]
        name = source.fields[0]
        for where, record in read_records(source.path, [name]):
            rows.setdefault(where, dict.fromkeys(columns, ""))[column] = record[name]
            last[source.path] = where
    if len(set(last.values())) > 1:
        ends = " and ".join(f"{path} at {where}" for path, where in last.items())
        raise CogsymError(f"The files of the task {settings.name} do not correspond line by line: they end, {ends}.")
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
