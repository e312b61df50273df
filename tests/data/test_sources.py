import csv
import gzip
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogsym.data import Document, Source, read_documents
from cogsym.data.sources import content_digest
from cogsym.errors import CogsymError

TEMPLATE = "English: {en}\nSwahili: {sw}"
PAIRS = [("Good morning.", "Habari za asubuhi."), ("Öl {5 €} 東京", "mafuta\u2028moja\x85"), ("one", " mbili ")]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    columns = list(rows[0])
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
        return path
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
    elif path.suffix == ".tsv":
        lines = ["\t".join(columns), *("\t".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines), "utf-8", newline="")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *(row.values() for row in rows)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.tsv", "a.csv", "a.parquet", "a.JSONL", "a.jsonl.gz", "a.tsv.gz", "a.csv.gz", "folder"]
)
def test_every_table_format_gives_the_same_pairs(tmp_path, name):
    rows = [{"id": str(i), "en": en, "sw": sw} for i, (en, sw) in enumerate(PAIRS)]
    path = write(tmp_path / name.lower(), rows).rename(tmp_path / name)

    expected = [f"English: {en}\nSwahili: {sw}" for en, sw in PAIRS]
    assert read_documents(Source(path, template=TEMPLATE)) == [Document(text) for text in expected]
    assert read_documents(Source(path, template=TEMPLATE), loss="target") == [
        Document(text, target_start=len(f"English: {en}\nSwahili: "))
        for text, (en, _) in zip(expected, PAIRS, strict=True)
    ]
    assert [d.text for d in read_documents(Source(path, field="sw"))] == [sw for _, sw in PAIRS]


def test_a_csv_cell_holds_what_quotes_protect(tmp_path):
    texts = ['a, "b"', "two\nlines", "x" * 200_000, "  blanks  "]
    path = write(tmp_path / "a.csv", [{"en": "x", "sw": text} for text in texts])
    assert [d.text for d in read_documents(Source(path, field="sw"))] == texts


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"en,sw\nx,y\nx\n", "line 3 has 1 column"),
        ("a.csv", b'en,sw\nx,"y\n', "line 2 is not CSV"),
        ("a.csv", b"en,sw\nx,\xff\n", "is not UTF-8 near line"),
        ("a.csv", b"en,fr\nx,y\n", "whose first line names the columns, has no field 'sw'"),
        ("a.csv", b"", "holds no document"),
        ("a.jsonl.gz", b'{"sw": "x"}', "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"sw": "x"}' * 99)[:-9], "is not a whole gzip file"),
        ("a.gz", gzip.compress(b"x"), "has the unknown suffix ''"),
        ("a.parquet.gz", gzip.compress(b"x"), "is compressed twice"),
    ],
)
def test_csv_and_gzip_that_cannot_be_read(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CogsymError, match=message):
        read_documents(Source(tmp_path / name, field="sw"))


def test_a_cut_gzip_file_has_no_digest(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"moja")[:-3])
    with pytest.raises(CogsymError, match="is not a whole gzip file"):
        content_digest(Source(tmp_path / "a.txt.gz"))


@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r")), max_size=8))
def test_txt_is_a_document_a_line(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text("first\n" + "\n".join(lines), "utf-8", newline="")
    assert [d.text for d in read_documents(Source(path))] == ["first", *(line for line in lines if line.strip())]


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfmoja\r\n\r\nmbili\r\n", b"moja\n\n \t\nmbili"])
def test_byte_order_mark_windows_ends_and_blank_lines_are_no_text(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    assert [d.text for d in read_documents(Source(tmp_path / "a.txt"))] == ["moja", "mbili"]


def test_blank_lines_between_json_objects(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "moja"}\r\n \t\r\n\n{"text": "mbili"}')
    assert [d.text for d in read_documents(Source(tmp_path / "a.jsonl"))] == ["moja", "mbili"]


def test_tsv_with_byte_order_mark_windows_ends_and_quotes(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'\xef\xbb\xbfen\tsw\r\n"one\tmoja\r\n\r\n')
    documents = read_documents(Source(tmp_path / "a.tsv", template="{en} = {sw}"), loss="target")
    assert documents == [Document('"one = moja', target_start=7)]


def test_rows_with_a_blank_field_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"en": "a", "sw": " "}, {"en": "", "sw": "b"}, {"en": "c", "sw": "d"}])
    assert [d.text for d in read_documents(Source(path, template="{en}{sw}"))] == ["cd"]


def test_parquet_strings_of_every_arrow_type(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(["moja", "mbili"]).cast(kind), "n": [1, 2]})
        pq.write_table(table, tmp_path / "a.parquet")
        assert [d.text for d in read_documents(Source(tmp_path / "a.parquet"))] == ["moja", "mbili"]


def test_parquet_longer_than_a_batch_keeps_its_order(tmp_path):
    rows = [{"text": f"sentensi {i}"} for i in range(10_000)]
    path = write(tmp_path / "a.parquet", rows)
    assert [d.text for d in read_documents(Source(path))] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("template", "text", "target"),
    [
        ("{en}\\n{sw}", "E\nS", "S"),
        ("{sw}", "S", "S"),
        ("{sw} <- {en}!", "S <- E!", "E!"),
        ("{{{en}}} {sw} {en}", "{E} S E", "E"),
    ],
)
def test_template(tmp_path, template, text, target):
    path = write(tmp_path / "a.jsonl", [{"en": "E", "sw": "S"}])
    (document,) = read_documents(Source(path, template=template), loss="target")
    assert document.text == text
    assert document.text[document.target_start :] == target
    assert read_documents(Source(path, template=template), loss="all") == [Document(text)]


@pytest.mark.parametrize(("weight", "copies", "extra"), [(1, 1, 0), (3, 3, 0), (0.25, 0, 10), (2.5, 2, 20)])
def test_weight_repeats_whole_and_draws_the_fraction(tmp_path, weight, copies, extra):
    lines = [f"line {i}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = [d.text for d in read_documents(Source(tmp_path / "a.txt", weight=weight))]
    assert documents[: 40 * copies] == lines * copies
    rest = documents[40 * copies :]
    assert len(rest) == len(set(rest)) == extra
    assert rest == [line for line in lines if line in rest], "the fraction keeps the file's order"
    assert rest != lines[:extra] or not extra, "the fraction is drawn at random, not the first lines"
    assert documents == [d.text for d in read_documents(Source(tmp_path / "a.txt", weight=weight))]
    assert set(Counter(documents).values()) <= {copies, copies + 1}


def test_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Source.parse("swahili.txt") == Source(Path("swahili.txt"))
    assert Source.parse("swahili.txt@2") == Source(Path("swahili.txt"), weight=2.0)
    assert Source.parse("d@y/a@b.txt@0.5") == Source(Path("d@y/a@b.txt"), weight=0.5)
    assert Source.parse("pairs.tsv#sw") == Source(Path("pairs.tsv"), field="sw")
    assert Source.parse("pairs.tsv#sw@2") == Source(Path("pairs.tsv"), field="sw", weight=2.0)
    assert Source.parse("d#1/pairs.tsv") == Source(Path("d#1/pairs.tsv"))
    assert Source.parse("d@y/a.txt") == Source(Path("d@y/a.txt"))
    assert Source.parse("C:\\d@y\\a.txt") == Source(Path("C:\\d@y\\a.txt"))
    Path("news@2019.txt").touch()
    assert Source.parse("news@2019.txt") == Source(Path("news@2019.txt"))


@pytest.mark.parametrize("weight", ["two", "", "0", "-1", "inf", "nan"])
def test_bad_weight(weight):
    with pytest.raises(CogsymError) as error:
        Source.parse(f"a.txt@{weight}")
    assert "weight" in str(error.value)
    assert "a.txt" in str(error.value)
    assert "number" in str(error.value)


# name of the file, its bytes (None: missing), arguments of Source, loss, what the message must contain
BAD_INPUT = {
    "missing": ("a.txt", None, {}, "all", ["a.txt does not exist"]),
    "suffix": ("a.docx", b"x", {}, "all", ["unknown suffix '.docx'", ".jsonl", ".parquet", "save_to_disk"]),
    "empty txt": ("a.txt", b"", {}, "all", ["a.txt holds no document"]),
    "blank txt": ("a.txt", b"\n \n\r\n", {}, "all", ["a.txt holds no document"]),
    "empty jsonl": ("a.jsonl", b"", {}, "all", ["a.jsonl holds no document"]),
    "empty tsv": ("a.tsv", b"", {}, "all", ["a.tsv holds no document"]),
    "header only": ("a.tsv", b"text\tid\n", {}, "all", ["a.tsv holds no document"]),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', {}, "all", ["line 3 is not JSON", "at column"]),
    "deep JSON": ("a.jsonl", b"[" * 200_000, {}, "all", ["line 1 is not JSON"]),
    "no object": ("a.jsonl", b'["a"]\n', {}, "all", ["line 1 is JSON but not an object"]),
    "no field": (
        "a.jsonl",
        b'{"text": "a"}\n{"body": "b", "id": 7}\n',
        {},
        "all",
        ["line 2, has no field 'text'", "body, id"],
    ),
    "no field in {}": ("a.jsonl", b"{}\n", {}, "all", ["line 1, has no field 'text'", "(none)"]),
    "field of txt": ("a.txt", b"x\n", {"field": "sw"}, "all", ["line 1, has no field 'sw'", "are: text"]),
    "number": ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', {}, "all", ["line 2: field 'text' is int", "a string"]),
    "null": ("a.jsonl", b'{"text": null}\n', {}, "all", ["line 1: field 'text' is null", "a string"]),
    "surrogate": ("a.jsonl", b'{"text": "a\\ud83d"}\n', {}, "all", ["line 1: field 'text' holds \\ud83d"]),
    "Latin-1": ("a.txt", b"moja\nma\xf1ana\n", {}, "all", ["not UTF-8: line 2, byte 3", "0xf1", "save the file"]),
    "Latin-1 after BOM": ("a.txt", b"\xef\xbb\xbfa\xf1a\n", {}, "all", ["line 1, byte 2", "0xf1"]),
    "UTF-16": ("a.txt", "moja".encode("utf-16"), {}, "all", ["not UTF-8: line 1, byte 1", "0xff"]),
    "Latin-1 jsonl": ("a.jsonl", b'{"text": "\xe9"}\n', {}, "all", ["not UTF-8: line 1, byte 11"]),
    "tsv columns": (
        "a.tsv",
        b"text\tid\na\t1\nb\n",
        {},
        "all",
        ["line 3 has 1 column(s), expected 2", "text, id"],
    ),
    "tsv field": ("a.tsv", b"en\tsw\na\tb\n", {}, "all", ["first line names the columns", "'text'", "en, sw"]),
    "template, no field": ("a.txt", b"x", {"template": "English:"}, "all", ["names no field", "'English:'"]),
    "template, open brace": ("a.txt", b"x", {"template": "{en"}, "all", ["'{en'", "cannot be read"]),
    "template, empty braces": ("a.txt", b"x", {"template": "{}"}, "all", ["no plain field name"]),
    "template, format": ("a.txt", b"x", {"template": "{en:>9}"}, "all", ["no plain field name"]),
    "template, missing field": (
        "a.jsonl",
        b'{"en": "a", "swh": "b"}\n',
        {"template": TEMPLATE},
        "target",
        ["line 1, has no field 'sw'", "en, swh"],
    ),
    "template and field": (
        "a.jsonl",
        b'{"en": "a"}\n',
        {"template": "{en}", "field": "en"},
        "all",
        ["both a field ('en') and a template"],
    ),
    "target without template": ("a.txt", b"x\n", {}, "target", ["a.txt has no template", "last field"]),
    "weight 0": ("a.txt", b"x\n", {"weight": 0.0}, "all", ["weight 0 of", "positive"]),
    "weight keeps none": ("a.txt", b"x\ny\n", {"weight": 0.1}, "all", ["weight 0.1 keeps none of the 2 documents"]),
    "no parquet": ("a.parquet", b"PAR1 but no more", {}, "all", ["a.parquet is not a readable Parquet file"]),
    "empty parquet": ("a.parquet", b"", {}, "all", ["a.parquet is not a readable Parquet file"]),
    "plain folder": ("folder/notes.txt", b"x", {}, "all", ["folder is a folder but not one", "save_to_disk"]),
}


def raises_one_sentence(source: dict, loss: str) -> str:
    with pytest.raises(CogsymError) as error:
        read_documents(Source(**source), loss)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(tmp_path, case):
    name, content, arguments, loss, fragments = BAD_INPUT[case]
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if case == "plain folder":
        pytest.importorskip("datasets")
        path = path.parent
    message = raises_one_sentence({"path": path, **arguments}, loss)
    for fragment in fragments:
        assert fragment in message
    if "template" not in arguments:
        assert str(path) in message


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"sentensi {i} ya jaribio", "id": i} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert "'sw'; the fields there are: text, id" in raises_one_sentence({"path": path, "field": "sw"}, "all")
    assert "field 'id' is of type int64, expected strings" in raises_one_sentence({"path": path, "field": "id"}, "all")

    raw = bytearray(path.read_bytes())
    raw[4:2000] = bytes(1996)  # the footer stays whole, the pages do not
    path.write_bytes(raw)
    assert "not a readable Parquet file" in raises_one_sentence({"path": path}, "all")

    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert "row 2: field 'text' is null" in raises_one_sentence({"path": path}, "all")

    latin = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xf1a")]
    )
    pq.write_table(pa.table({"text": latin}), path)
    assert "not UTF-8 somewhere in rows 1 to 1" in raises_one_sentence({"path": path}, "all")

    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "holds no document" in raises_one_sentence({"path": path}, "all")


def test_bad_datasets_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": ["moja", "mbili"], "id": [1, 2]})
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(str(tmp_path / "both"))
    message = raises_one_sentence({"path": tmp_path / "both"}, "all")
    assert "splits train, test" in message
    assert str(tmp_path / "both" / "train") in message
    assert [d.text for d in read_documents(Source(tmp_path / "both" / "train"))] == ["moja", "mbili"]

    assert "'sw'; the fields there are: text, id" in raises_one_sentence(
        {"path": tmp_path / "both" / "train", "field": "sw"}, "all"
    )
    for file in (tmp_path / "both" / "test").glob("*.arrow"):
        file.write_bytes(b"damaged")
    assert "damaged" in raises_one_sentence({"path": tmp_path / "both" / "test"}, "all")

    monkeypatch.setitem(sys.modules, "datasets", None)
    message = raises_one_sentence({"path": tmp_path / "both" / "train"}, "all")
    assert 'pip install "cogsym[datasets]"' in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tsv", "a.parquet", "folder/state.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    signal.alarm(20)  # ends the process if it waits
    where = path.parent if path.parent != tmp_path else path
    message = raises_one_sentence({"path": where}, "all")
    with pytest.raises(CogsymError, match="is a pipe or a device"):
        content_digest(Source(where))
    signal.alarm(0)
    assert f"{path} is a pipe or a device, expected a file, as it is read more than once." in message


def test_unknown_loss_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="'half'"):
        read_documents(Source(tmp_path / "a.txt"), loss="half")  # type: ignore[arg-type]
