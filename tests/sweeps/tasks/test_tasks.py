"""What tasks ask, read back from the tokens, and where they come from."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sweeps.task_rows import PAIRS, TRANSLATION, by_metric, read, scored, write_rows
from texts import sentences
from transformers import AutoTokenizer

from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generate, Score, TaskDocument
from cogsym.sweeps.tasks import settings
from cogsym.sweeps.tasks.task import load_task

# What is asked


def test_xcopa_asks_what_lm_evaluation_harness_asks(tokenizer, xcopa):
    task = load_task(f"xcopa-sw:{xcopa}")
    assert (task.name, task.side, task.language) == ("xcopa-sw:xcopa.jsonl", "perception", "sw")
    assert task.metrics == ("accuracy", "margin") and task.num_documents == 2 and task.notes == []
    cause, effect = task.documents(tokenizer, 64)
    assert read(tokenizer, cause) == [
        ("Mama anapika chakula kwa sababu", " mtoto ana njaa."),
        ("Mama anapika chakula kwa sababu", " kitabu kizuri."),
    ]
    assert read(tokenizer, effect) == [
        ("Mtoto anasoma sana kwa hiyo", " analia."),
        ("Mtoto anasoma sana kwa hiyo", " ni mwerevu?"),
    ]
    assert [cause.key, effect.key] == ["line 1", "line 2"]
    indonesian = load_task(f"xcopa-id:{xcopa}").documents(tokenizer, 64)
    assert [read(tokenizer, document)[0][0].split()[-1] for document in indonesian] == ["karena", "maka"]


def test_belebele_s_columns_and_labels(tokenizer, tmp_path):
    answers = {f"mc_answer{i}": f"Answer {i}" for i in range(1, 5)}
    row = {"flores_passage": "A passage.", "question": "What?", **answers, "correct_answer_num": "3", "dialect": "x"}
    task = load_task(f"belebele:{write_rows(tmp_path / 'b.jsonl', [row])},language=sw")
    (document,) = task.documents(tokenizer, 200)
    assert read(tokenizer, document) == [("A passage.\nQ: What?\nA:", f" Answer {i}") for i in range(1, 5)]
    measures = by_metric(task.measure(document, scored(-9, -8, -7, -6)))
    assert measures["accuracy"].statistics == (0, 1, 0.25) and measures["margin"].value == -1


def test_the_end_of_a_template_is_scored_with_the_option(tokenizer, tmp_path):
    path = write_rows(tmp_path / "w.tsv", [])
    path.write_text("a\tb\tc\tlabel\nmama\tmtoto\tanasoma\tB\n", "utf-8")
    settings = {"kind": "choice", "template": "Leo {option} {c}.", "options": ["{a}", "{b}"], "labels": ["A", "B"]}
    task = load_task({**settings, "data": path, "metrics": ["accuracy", "accuracy_per_byte"]})
    (document,) = task.documents(tokenizer, 64)
    assert read(tokenizer, document) == [("Leo", " mama anasoma."), ("Leo", " mtoto anasoma.")]
    measures = by_metric(task.measure(document, scored(-13, -13.5)))  # over 13 and 14 bytes
    assert measures["accuracy"].value == 0 and measures["accuracy_per_byte"].value == 1


def test_letters_may_be_options(tokenizer, tmp_path):
    path = write_rows(tmp_path / "mc.jsonl", [{"q": "Which?", "a": "this", "b": "that", "label": "B"}])
    settings = {"template": "{q}\nA: {a}\nB: {b}\nAnswer: {option}", "options": ["A", "B"], "labels": ["A", "B"]}
    (document,) = load_task({"kind": "choice", "data": path, **settings}).documents(tokenizer, 64)
    assert read(tokenizer, document) == [("Which?\nA: this\nB: that\nAnswer:", f" {letter}") for letter in "AB"]


@pytest.mark.parametrize("seed", range(4))
def test_options_share_all_tokens_before_the_scored_ones(merging, tmp_path, seed):
    rng = random.Random(seed)
    rows = []
    for premise, first, second in zip(*(sentences(40, seed=10 * seed + i) for i in range(3)), strict=True):
        rows.append({"premise": premise[: rng.randint(3, 30)], "a": first, "b": second, "label": 0})
    settings = {"kind": "choice", "template": "{premise}{option}", "options": ["{a}", "{b}"]}
    task = load_task(
        {**settings, "data": write_rows(tmp_path / "rows.jsonl", [r for r in rows if r["premise"].strip()])}
    )
    moved = 0
    for document, row in zip(task.documents(merging, 200), rows, strict=True):
        first, second = document.requests
        assert first.first == second.first and first.tokens[: first.first] == second.tokens[: first.first]
        for request, option in zip(document.requests, (row["a"], row["b"]), strict=True):
            assert merging.decode(request.tokens[1:]) == row["premise"] + option
            assert list(request.tokens[1:]) == merging(row["premise"] + option, add_special_tokens=False)["input_ids"]
            moved += not option.startswith(merging.decode(request.tokens[request.first :]).lstrip()[:1])
            assert merging.decode(request.tokens[request.first :]).endswith(option)  # nothing of an option is given
    assert moved  # some token does reach over the boundary


def test_a_translation_is_scored_and_generated_from_one_prompt(tokenizer, pairs):
    task = load_task(f"en-sw:{pairs},shots=2,limit=3,max_new_tokens=7")
    assert task.side == "production" and task.num_documents == 3
    documents = task.documents(tokenizer, 300)
    assert [document.key for document in documents] == ["line 3", "line 4", "line 5"]
    example = "English: {en}\nSwahili: {sw}\n\n"
    header = "".join(example.format(**row) for row in PAIRS[:2])
    for document, row in zip(documents, PAIRS[2:5], strict=True):
        prompt = f"{header}English: {row['en']}\nSwahili:"
        assert read(tokenizer, document) == [(prompt, f" {row['sw']}"), (prompt, "")]
        score, generate = document.requests
        assert score.tokens[: score.first] == generate.tokens
        assert (generate.max_new_tokens, generate.stops) == (7, ("\n",))


def test_only_what_the_metrics_need_is_asked(tokenizer, pairs):
    def kinds(metrics: str) -> list[type]:
        document = load_task(f"sw-en:{pairs},metrics={metrics}").documents(tokenizer, 400)[0]
        return [type(request) for request in document.requests]

    assert kinds("bits_per_byte") == kinds("[log_likelihood]") == [Score]
    assert kinds("[chrf++, empty]") == [Generate]
    assert kinds("[chrf++, bits_per_byte]") == [Score, Generate]


def test_stops_and_separator_are_the_task_s(tokenizer, pairs):
    task = load_task(f'en-sw:{pairs},stops=["\\n", "END"],metrics=empty,separator=!')
    (request,) = task.documents(tokenizer, 400)[0].requests
    assert request.stops == ("\n", "END") and request.tokens[0] == tokenizer.get_vocab()["!"]
    (given,) = load_task(f"en-sw:{pairs},metrics=empty", separator="!").documents(tokenizer, 400)[0].requests
    assert given.tokens == request.tokens
    (own,) = load_task(f"en-sw:{pairs},metrics=empty,separator=!", separator="?").documents(tokenizer, 400)[0].requests
    assert own.tokens == request.tokens


def test_text_is_scored_from_its_first_token(tokenizer, pairs):
    task = load_task(f"text:{pairs}#sw,language=sw")
    assert (task.side, task.metrics, task.name) == ("production", ("bits_per_byte",), "text:pairs.jsonl#sw")
    for document, row in zip(task.documents(tokenizer, 64), PAIRS, strict=True):
        assert read(tokenizer, document) == [("", row["sw"])]
        (measure,) = task.measure(document, scored(-10 * math.log(2)))
        assert measure.value == pytest.approx(10 / len(row["sw"].encode()))


def test_files_that_correspond_line_by_line(tokenizer, tmp_path):
    (tmp_path / "eng.txt").write_text("One.\n\nThree.\nFour.\n", "utf-8")
    write_rows(tmp_path / "swa.jsonl", [{"text": word} for word in ("Moja.", "Mbili.", "Tatu.", "Nne.")])
    file = tmp_path / "task.yaml"
    file.write_text(
        'kind: translation\nside: production\nlanguage: sw\ntemplate: "{en} = {sw}"\nmetrics: [bits_per_byte]\n'
        "data: {en: eng.txt, sw: swa.jsonl#text}\n",
        "utf-8",
    )
    task = load_task(file)
    assert task.notes == ["1 of 4 rows of the task task have a blank column; left out."]
    documents = task.documents(tokenizer, 64)
    assert [read(tokenizer, document)[0] for document in documents] == [
        ("One. =", " Moja."), ("Three. =", " Tatu."), ("Four. =", " Nne."),
    ]  # fmt: skip
    assert [document.key for document in documents] == ["line 1", "line 3", "line 4"]


def test_labels_are_read_from_every_format(xcopa, tmp_path):
    rows = [json.loads(line) for line in xcopa.read_text("utf-8").splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    columns = list(rows[0])
    lines = ["\t".join(columns), *("\t".join(str(row[column]) for column in columns) for row in rows)]
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    for path in (xcopa, tmp_path / "x.parquet", tmp_path / "x.tsv"):
        task = load_task(f"xcopa-sw:{path}")
        answers = [task.measure(TaskDocument(key, ()), scored(-1, -2))[0].value for key in task._questions]
        assert answers == [1, 0]


# Documents that are too long


def test_a_long_text_is_refused_or_read_in_windows(tokenizer, tmp_path):
    texts = ["habari", " ".join(sentences(9)), " ".join(sentences(5))]
    (tmp_path / "t.txt").write_text("\n".join(texts), "utf-8")
    task = load_task(f"text:{tmp_path / 't.txt'}")
    whole = [document.requests[0].tokens for document in task.documents(tokenizer, 1000)]
    length = len(whole[2])
    assert task.documents(tokenizer, len(whole[1]))[1].requests[0].tokens == whole[1] and task.notes == []
    with pytest.raises(CogsymError, match=rf"2 of 3 documents .* {length - 1} tokens \(the longest, line 2, takes"):
        task.documents(tokenizer, length - 1)
    for context in (2, 5, length - 1, length):
        documents = task.documents(tokenizer, context, truncate=True)
        for document, tokens in zip(documents, whole, strict=True):
            windows = [request.tokens for request in document.requests]
            assert all(
                2 <= len(window) <= context and request.first == 1
                for window, request in zip(windows, document.requests, strict=True)
            )
            assert sum((window[1:] for window in windows), ()) == tokens[1:]  # each token predicted once
            assert all(after[0] == before[-1] for before, after in pairwise(windows))
        (note,) = task.notes
        assert "read in windows" in note and f"{sum(len(tokens) > context for tokens in whole)} of 3" in note
    task.documents(tokenizer, 1000)
    assert task.notes == []


def test_a_long_question_loses_its_beginning_in_all_options(tokenizer, xcopa):
    task = load_task(f"xcopa-sw:{xcopa}")
    whole = task.documents(tokenizer, 64)
    longest = max(len(request.tokens) for document in whole for request in document.requests)
    with pytest.raises(CogsymError, match=f"1 of 2 documents .* takes {longest}"):
        task.documents(tokenizer, longest - 1)
    cut = task.documents(tokenizer, longest - 3, truncate=True)
    for before, after in zip(whole, cut, strict=True):
        excess = max(0, max(len(request.tokens) for request in before.requests) - (longest - 3))
        for a, b in zip(before.requests, after.requests, strict=True):
            assert b == Score(a.tokens[:1] + a.tokens[1 + excess :], a.first - excess)
    assert "beginnings are cut off" in task.notes[0]
    with pytest.raises(CogsymError, match="does not fit"):
        task.documents(tokenizer, 3, truncate=True)


def test_a_long_translation_leaves_room_to_write(tokenizer, pairs):
    task = load_task(f"en-sw:{pairs},max_new_tokens=30,metrics=[chrf++, bits_per_byte, bits_per_byte]")
    assert task.metrics == ("chrf++", "bits_per_byte")
    score, generate = task.documents(tokenizer, 1000)[0].requests
    needed = len(generate.tokens) + 30
    assert needed > len(score.tokens)
    assert task.documents(tokenizer, needed)[0].requests == (score, generate)
    with pytest.raises(CogsymError, match=f"takes {needed}"):
        load_task(f"en-sw:{pairs},max_new_tokens=30,limit=1").documents(tokenizer, needed - 1)
    fitted, shorter = task.documents(tokenizer, needed - 5, truncate=True)[0].requests
    assert shorter.tokens == generate.tokens[:1] + generate.tokens[6:] and shorter.max_new_tokens == 30
    assert fitted == score or len(fitted.tokens) == needed - 5
    with pytest.raises(CogsymError, match="does not fit"):
        task.documents(tokenizer, 30, truncate=True)


# The digest


def test_the_digest_is_of_data_and_settings(xcopa, tmp_path):
    base = load_task(f"xcopa-sw:{xcopa}").digest()
    other = tmp_path / "elsewhere"
    other.mkdir()
    copy = other / "copy.jsonl"
    copy.write_bytes(xcopa.read_bytes())
    assert load_task(f"xcopa-sw:{copy}").digest() == load_task(f"xcopa-sw:{xcopa},name=x").digest() == base
    changed = [f"xcopa-sw:{xcopa},{s}" for s in ("limit=1", "shots=1", "metrics=margin", "label=label,separator=<end>")]
    changed.append(f"xcopa-id:{xcopa}")
    copy.write_bytes(xcopa.read_bytes().replace(b"njaa", b"kiu"))
    changed.append(f"xcopa-sw:{copy}")
    digests = [load_task(what).digest() for what in changed]
    assert len({base, *digests}) == 1 + len(changed)
    assert load_task(f"xcopa-sw:{xcopa},limit=1").digest() == load_task(f"xcopa-sw:{xcopa}").digest(1) != base


# Files and the command line


def test_a_file_s_data_are_beside_it(tokenizer, pairs, tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, dump in (("mine.yaml", "kind: text\ndata: ../pairs.jsonl#sw\n"), ("mine.json", None)):
        (folder / name).write_text(dump or json.dumps({"kind": "text", "data": "../pairs.jsonl#sw"}), "utf-8")
        monkeypatch.chdir(tmp_path / "tasks")
        task = load_task(name)
        assert task.name == "mine" and task.num_documents == len(PAIRS)
        monkeypatch.chdir(tmp_path)
        assert load_task(f"tasks/{name}").digest() == task.digest()
        assert load_task(f"tasks/{name},data=pairs.jsonl#sw").digest() == task.digest()  # the command line's: from here
        assert load_task(f"tasks/{name}:pairs.jsonl#en,limit=2").num_documents == 2


def test_settings_on_the_command_line(pairs):
    line = rf"en-sw:{pairs},template=A, b: {{en}}\nC={{sw}},shots=1,language=no,metrics=[chrf++, cut],stops=END"
    settings = load_task(line).kind
    assert settings.template == r"A, b: {en}\nC={sw}" and settings.shots == 1
    assert settings.language == settings.output_language == "no"
    assert settings.metrics == ("chrf++", "cut") and settings.stops == ("END",)


def test_every_built_in_task_is_shipped_and_named_in_its_file():
    root = Path(settings.__file__).parent / "builtin"
    assert set(settings._BUILTIN) == {"belebele", "en-sw", "sw-en", "text", "xcopa-id", "xcopa-sw"}
    for name, path in settings._BUILTIN.items():
        assert path.parent == root and f"{name}:" in path.read_text("utf-8")
        with pytest.raises(CogsymError, match=f"names no data; write the file after it, as in {name}:FILE"):
            load_task(name)


# Real data


def test_real_xcopa_ntrex_and_global_voices(data_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "models" / "stories260K")
    text = data_folder / "text"
    for language in ("sw", "id"):
        task = load_task(f"xcopa-{language}:{text / 'xcopa' / f'{language}.test.jsonl'}")
        documents = task.documents(tokenizer, 512)
        assert len(documents) == 500 and all(len(document.requests) == 2 for document in documents)
        always_first = [task.measure(document, scored(0, -1))[0].value for document in documents]
        assert 0.4 < np.mean(always_first) < 0.6
    parallel = {"en": text / "ntrex-128" / "eng.jsonl", "sw": text / "ntrex-128" / "swa.jsonl"}
    task = load_task({**TRANSLATION, "data": {column: f"{path}#text" for column, path in parallel.items()}})
    assert task.num_documents == 1997
    assert load_task(f"text:{parallel['sw']},language=sw").num_documents == 1997
    pairs = text / "globalvoices-en-sw" / "test.jsonl"
    for name in ("en-sw", "sw-en"):
        task = load_task(f"{name}:{pairs},limit=100")
        for document in task.documents(tokenizer, 8192):
            score, generate = document.requests
            assert generate.tokens == score.tokens[: len(generate.tokens)]  # the prompt runs once
