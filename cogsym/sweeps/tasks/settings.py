"""What a task is, as a user writes it: settings in a small file, checked here.

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

The kinds, and what the model is asked (`cogsym.sweeps.tasks.kinds` tells how another is added):

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
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_type_hints

import yaml

from cogsym import user_files
from cogsym.data import Source
from cogsym.errors import CogsymError
from cogsym.registry import unknown
from cogsym.sweeps.tasks.kinds import TASK_KINDS, Side, TaskKind
from cogsym.sweeps.tasks.rows import WAYS

_BUILTIN = {path.stem: path for path in sorted((Path(__file__).parent / "builtin").glob("*.yaml"))}
_SIDES = get_args(Side)
_TWO_LETTERS = frozenset(  # ISO 639-1
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee "
    "el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is "
    "it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms "
    "mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si "
    "sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh "
    "yi yo za zh zu".split()
)
_Given = dict[str, Any]
_Type = Literal["text", "number", "texts", "columns", "data"]


def load_settings(what: str | Path | Mapping[str, Any], separator: str | None = None) -> tuple[TaskKind, list[str]]:
    """(The settings of a task from what a user writes, sentences that the user should be told).

    Args:
        what: a task as the command line names it, or its settings, with paths relative to the working directory.
        separator: the token before each document, where the task does not name one.

    Raises:
        CogsymError: an unknown task, setting, kind or metric, or a value that it cannot have.
    """
    words: dict[str, str] = {}
    if isinstance(what, Mapping):
        given, folder = dict(what), Path()
    else:
        given, words, folder = _named(str(what))
    given = {"name": "task", "kind": None, "separator": separator} | given
    task = f"task {words.get('name', given['name'])}"
    kind = str(words.get("kind", given["kind"]))
    if kind not in TASK_KINDS:
        raise unknown("kind", words.get("kind", given["kind"]), TASK_KINDS, f" of {task}")
    cls = TASK_KINDS[kind]
    settings = {setting.name: setting for setting in fields(cls)}
    for name in (*given, *words):
        if name not in settings:
            owners = [other for other in TASK_KINDS if name in {f.name for f in fields(TASK_KINDS[other])}]
            if owners:
                raise CogsymError(
                    f"The setting {name} of {task} is for the kind {' or '.join(owners)}, not for {kind}."
                )
            raise unknown("setting", name, settings, f" of {task}")
    types = {name: _type_of(name, hint) for name, hint in get_type_hints(cls).items() if name in settings}
    given |= {name: _read_word(types[name], word) for name, word in words.items()}
    given = {
        name: _checked(settings[name], types[name], value, task) for name, value in given.items() if value is not None
    }
    given["data"], given["template"] = _data(given, cls, folder, task)
    given.setdefault("side", cls.default_side)
    given["metrics"] = tuple(dict.fromkeys(given.get("metrics") or cls.default_metrics))
    return _fitting(cls(**given), task)


def _named(text: str) -> tuple[_Given, dict[str, str], Path]:
    """What "xcopa-sw:sw.test.jsonl,limit=100" and the like stand for: the settings of the file, those of the command
    line as words, and the folder of paths."""
    task, *changes = re.split(r",(?=\w+=)", text)
    word, data = (task, "") if Path(task).exists() else task.partition(":")[::2]
    path = _BUILTIN.get(word, Path(word).expanduser())
    if path.suffix not in user_files.SUFFIXES:
        raise unknown("task", word, [*_BUILTIN, f"a file that ends in {' or '.join(user_files.SUFFIXES)}"])
    words = {name: value for name, _, value in (change.partition("=") for change in changes)}
    data = words.setdefault("data", data)
    if not data:
        del words["data"]
    given = _read(path)
    given.setdefault("name", path.stem + (f":{Path(data).name}" if data else ""))
    return given, words, Path() if data else path.parent


def _read(path: Path) -> _Given:
    given = user_files.read(path)
    if not isinstance(given, dict):
        raise CogsymError(
            f"{path} holds a {type(given).__name__}, expected the settings of a task, such as kind: text."
        )
    return given


def _type_of(name: str, hint: Any) -> _Type:
    """What a user may write for a setting of this name and type."""
    if name == "data":
        return "data"
    if int in (hint, *get_args(hint)):
        return "number"
    if str in (hint, *(get_args(hint) if isinstance(hint, UnionType) else ())):
        return "text"
    return "texts" if hint == tuple[str, ...] else "columns"


def _read_word(sort: _Type, word: str) -> Any:
    """The value of a setting on the command line."""
    if sort in ("text", "data"):
        return word
    try:
        read = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return [read] if sort == "texts" and not isinstance(read, list) else read


def _checked(setting: Field[Any], sort: _Type, value: Any, task: str) -> Any:
    """The value if it is of the type that the setting has."""
    if sort == "number":
        least = setting.metadata.get("least", 0)
        fits, expected = type(value) is int and value >= least, f"a whole number from {least}"
    elif sort == "texts":
        entries = object if setting.metadata.get("any") else str
        fits = isinstance(value, list) and all(isinstance(entry, entries) for entry in value)
        value, expected = tuple(map(str, value)) if fits else value, "a list of texts"
    elif sort == "columns":
        fits, expected = isinstance(value, dict), "columns, and how each is written"
        if fits:
            value = {
                str(column): {str(k): str(v) for k, v in way.items()} if isinstance(way, dict) else way
                for column, way in value.items()
            }
    else:
        fits = isinstance(value, str) or (sort == "data" and isinstance(value, (Path, dict)))
        expected = "a text; put it in quotes"
    if not fits:
        raise CogsymError(f"The setting {setting.name} of {task} is {value!r}, expected {expected}.")
    return value


def _data(given: _Given, cls: type[TaskKind], folder: Path, task: str) -> tuple[dict[str, Source], str]:
    """(The files by column, the template)."""
    data = given.get("data")
    if not data:
        raise CogsymError(f"The {task} names no data; write the file after it, as in {given['name']}:FILE.")
    parts = {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {"": str(data)}
    sources = {column: Source.parse(str(folder / Path(part).expanduser())) for column, part in parts.items()}
    for source in sources.values():
        if source.weight != 1:
            raise CogsymError(f"The data of {task} have the weight {source.weight:g}, but a task reads them once.")
    column = sources[""].field if "" in sources else None
    template = given.get("template") or cls.default_template(column)
    if column and not cls.default_template(column):
        raise CogsymError(
            f"The data of {task} name the column {column!r}, but the template names the columns of a {given['kind']}; "
            "write the file alone."
        )
    if not template:
        raise CogsymError(f'The {task} has no template, such as "English: {{en}}\\nSwahili: {{sw}}".')
    return sources, template


def _fitting(kind: TaskKind, task: str) -> tuple[TaskKind, list[str]]:
    """The settings if they fit together."""
    if kind.side not in _SIDES:
        raise CogsymError(f"The side {kind.side!r} of {task} is unknown, expected {' or '.join(_SIDES)}.")
    for metric in kind.metrics:
        if metric not in kind.known_metrics:
            raise unknown("metric", metric, kind.known_metrics, f" of {task} for the kind {kind.kind}")
    kind, notes = kind.checked()
    code = kind.language.replace("_", "-").partition("-")[0]
    if len(code) == 2 and code.lower() not in _TWO_LETTERS:
        notes = [
            *notes,
            f"The language {kind.language!r} of {task} is no code of ISO 639-1; results carry it as it is.",
        ]
    texts, _ = kind.columns()
    for column, way in kind.write.items():
        if column not in texts:
            raise CogsymError(f"The {task} writes the column {column!r}, which none of its templates names.")
        if way not in WAYS and not isinstance(way, dict):
            raise CogsymError(
                f"The column {column!r} of {task} is written {way!r}, expected {', '.join(WAYS)} or a table such as "
                "{cause: because}."
            )
    return kind, notes
