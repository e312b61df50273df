"""Tasks that cannot be asked: each is told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweeps.task_rows import TRANSLATION
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cogsym.errors import CogsymError
from cogsym.sweeps.tasks.task import load_task

CHOICE = {"kind": "choice", "template": "{premise} {option}", "options": ["{choice1}", "{choice2}"]}
BAD: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "file not found": ({"kind": "text", "data": "nowhere.txt"}, b"", "nowhere.txt does not exist"),
    "empty": ({"kind": "text"}, b"\n \n", "holds no document"),
    "all shots": (TRANSLATION | {"shots": 1}, b'{"en": "a", "sw": "b"}\n', "has 1 rows for 1 examples"),
    "not UTF-8": ({"kind": "text"}, b'{"text": "caf\xe9"}\n', "not UTF-8: line 1, byte 14"),
    "missing column": (TRANSLATION, b'{"en": "a", "swa": "b"}\n', "has no field 'sw'; the fields there are: en, swa"),
    "missing label": (CHOICE, b'{"premise": "p", "choice1": "a", "choice2": "b"}\n', "has no field 'label'"),
    "label out of range": (
        CHOICE, b'{"premise": "p", "choice1": "a", "choice2": "b", "label": 2}\n', "label '2', expected one of 0, 1"
    ),
    "options equal": (CHOICE, b'{"premise": "p", "choice1": "a", "choice2": "a", "label": 0}\n', "expected different"),
    "unknown value": (
        CHOICE | {"write": {"premise": {"cause": "kwa"}}},
        b'{"premise": "p", "choice1": "a", "choice2": "b", "label": 0}\n',
        "line 1: column 'premise' is 'p', expected one of cause",
    ),
    "column is a number": (TRANSLATION, b'{"en": 3, "sw": "b"}\n', "field 'en' is int, expected a string"),
    "unknown kind": ({"kind": "poem"}, b"x\n", "The kind 'poem' .* expected one of choice, text, translation"),
    "no kind": ({}, b"x\n", "The kind None"),
    "unknown metric": ({"kind": "text", "metrics": ["rouge"]}, b"x\n", "The metric 'rouge'"),
    "metric of another kind": ({"kind": "text", "metrics": ["accuracy"]}, b"x\n", "'accuracy' .* for the kind text"),
    "setting of another kind": ({"kind": "text", "options": ["a"]}, b"x\n", "options .* is for the kind choice"),
    "unknown setting": ({"kind": "text", "colour": "red"}, b"x\n", "The setting 'colour'"),
    "YAML's no": ({"kind": "text", "language": False}, b"x\n", "is False, expected a text; put it in quotes"),
    "limit": ({"kind": "text", "limit": 0}, b"x\n", "limit .* is 0, expected a whole number from 1"),
    "shots": (TRANSLATION | {"shots": True}, b"x\n", "shots .* is True"),
    "no side": (TRANSLATION | {"side": ""}, b"x\n", "The side '' .* expected perception or production"),
    "no template": ({"kind": "translation", "side": "production"}, b"x\n", "has no template"),
    "one column": (TRANSLATION | {"template": "{sw}"}, b"x\n", "needs two columns"),
    "no place for the option": (CHOICE | {"template": "{premise}"}, b"x\n", "expected one {option} in its template"),
    "one option": (CHOICE | {"options": ["a"]}, b"x\n", "two options or more"),
    "labels": (CHOICE | {"labels": [1, 2, 3]}, b"x\n", "3 labels for 2 options"),
    "written column": (CHOICE | {"write": {"x": "lower_first"}}, b"x\n", "writes the column 'x'"),
    "way of writing": (CHOICE | {"write": {"premise": "loud"}}, b"x\n", "is written 'loud'"),
    "broken template": (TRANSLATION | {"template": "{en} {sw"}, b"x\n", "cannot be read"),
    "weight": ({"kind": "text", "data": "rows.jsonl@2"}, b"x\n", "weight 2"),
    "column of a table": (TRANSLATION | {"data": "rows.jsonl#en"}, b"x\n", "write the file alone"),
    "column without a file": (TRANSLATION | {"data": {"en": "rows.jsonl#en"}}, b'{"en": "a"}\n', "no column 'sw'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(name, tmp_path, monkeypatch):
    settings, content, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(content)
    with pytest.raises(CogsymError, match=message) as caught:
        load_task({"data": "rows.jsonl", **settings})
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_files_that_do_not_correspond(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("1\n2\n3\n", "utf-8")
    Path("b.txt").write_text("1\n2\n", "utf-8")
    with pytest.raises(CogsymError, match=r"line by line: they end, a\.txt at line 3 and b\.txt at line 2"):
        load_task({**TRANSLATION, "data": {"en": "a.txt", "sw": "b.txt"}})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.yaml", b"kind: [text\n", "t.yaml is not yaml"),
        ("t.json", b"{", "t.json is not json"),
        ("t.yaml", b"- text\n", "holds a list, expected the settings"),
        ("t.yaml", b"kind: \xff\n", "is not yaml"),
        ("t.yaml", None, "t.yaml cannot be read"),
    ],
)
def test_a_bad_task_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CogsymError, match=message) as caught:
        load_task(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_misspelt_setting_on_the_command_line(pairs):
    with pytest.raises(CogsymError, match="The setting 'lang' of task text"):
        load_task(f"text:{pairs}#sw,lang=sw")


@pytest.mark.parametrize("what", ["xcopa", "poem:x.txt", "pairs.jsonl", ""])
def test_an_unknown_task(what):
    with pytest.raises(CogsymError, match="is unknown, expected one of belebele, en-sw"):
        load_task(what)


def test_a_tokenizer_that_drops_the_text(tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1}, merges=[]))
    (tmp_path / "t.txt").write_text("a\nb\n", "utf-8")
    task = load_task(f"text:{tmp_path / 't.txt'}")
    with pytest.raises(CogsymError, match="makes no token of the text of line 2"):
        task.documents(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), 8)
