"""What tasks ask, read back from the tokens, and what they make of the answers."""

from __future__ import annotations

import json
import math
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from texts import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cogsym.data import Document as Text
from cogsym.data import pack, tokenize
from cogsym.errors import CogsymError
from cogsym.sweeps import task_files
from cogsym.sweeps.metrics import METRICS
from cogsym.sweeps.requests import Document, Generate, Generated, Score, Scored
from cogsym.sweeps.tasks import Measure, Task, load_task
from cogsym.training.evaluate import bits_per_byte, option_log_probabilities

XCOPA = [
    {
        "premise": "Mama anapika chakula.",
        "question": "cause",
        "choice1": "Mtoto ana njaa.",
        "choice2": "Kitabu kizuri.",
    },
    {"premise": "Mtoto anasoma sana.", "question": "effect", "choice1": "Analia.", "choice2": "Ni mwerevu?"},
]
PAIRS = [{"en": f"Sentence {i}, in English.", "sw": f"Sentensi ya {i}: habari!"} for i in range(8)]


def trained(pre_tokenizer: Any, size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [" ".join(map(str, row.values())) for row in XCOPA + PAIRS] + sentences(100)
    texts += ["A: Answer B: Answer: A = Moja = Tatu = Nne: B"] * 9
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), 400)


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """Merges across blanks and words, so that a token may reach from the question into an option."""
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), 600)


@pytest.fixture(scope="module")
def data_folder() -> Path:
    root = Path(os.environ.get("COGSYM_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("no test data: COGSYM_TEST_DATA is not set and ../shared/data does not exist")
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def xcopa(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "xcopa.jsonl", [row | {"label": i} for i, row in enumerate(XCOPA)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


def read(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[tuple[str, str]]:
    """(given, scored) of a score, (prompt, "") of a generation; the separator first in each."""
    parts = []
    for request in document.requests:
        first = request.first if isinstance(request, Score) else len(request.tokens)
        assert request.tokens[0] == tokenizer.eos_token_id and first >= 1
        parts.append((tokenizer.decode(request.tokens[1:first]), tokenizer.decode(request.tokens[first:])))
    return parts


def scored(*log_likelihoods: float) -> list[Scored]:
    return [Scored(value, False, 3) for value in log_likelihoods]


def by_metric(measures: list[Measure]) -> dict[str, Measure]:
    for measure in measures:
        metric = METRICS[measure.metric]
        assert len(measure.statistics) == metric.size
        assert measure.value == metric.combine(np.array(measure.statistics))
    return {measure.metric: measure for measure in measures}


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
        answers = [task.measure(Document(key, ()), scored(-1, -2))[0].value for key in task._items]
        assert answers == [1, 0]


# What the answers measure


def test_choice_by_hand(tokenizer, xcopa):
    task = load_task(f"xcopa-sw:{xcopa},metrics=[accuracy, accuracy_per_byte, margin]")
    first, second = task.documents(tokenizer, 64)
    right = by_metric(task.measure(first, scored(-3.0, -4.5)))
    assert [right[name].value for name in ("accuracy", "accuracy_per_byte", "margin")] == [1, 1, 1.5]
    assert right["accuracy"].statistics == (1, 1, 0.5)
    # "analia." has 7 bytes and "ni mwerevu?" 11: per byte the longer one is likelier, and it is the right one.
    wrong = by_metric(task.measure(second, scored(-8.0, -9.0)))
    assert [wrong[name].value for name in ("accuracy", "accuracy_per_byte", "margin")] == [0, 1, -1]
    tie = by_metric(task.measure(first, scored(-2.0, -2.0)))
    assert tie["accuracy"].value == 0 and tie["margin"].value == 0


def test_translation_by_hand(tokenizer, pairs):
    task = load_task(
        f"en-sw:{pairs},shots=0,metrics=[log_likelihood, bits_per_byte, bleu, chrf++, language, empty, repeated, cut]"
    )
    document = task.documents(tokenizer, 300)[0]

    def answered(text: str, ended: str) -> dict[str, Measure]:
        return by_metric(task.measure(document, [Scored(-6.0, False, 4), Generated(text, 9, ended)]))

    exact = answered(f" {PAIRS[0]['sw']} ", "stop")
    assert list(exact) == list(task.metrics)
    assert exact["chrf++"].value == 100 and exact["bleu"].value == pytest.approx(100)
    assert exact["log_likelihood"].value == -1.5
    assert exact["bits_per_byte"].statistics == (6.0, len(PAIRS[0]["sw"].encode()))
    assert [exact[name].value for name in ("language", "empty", "repeated", "cut")] == [1, 0, 0, 0]
    assert {name: measure.text for name, measure in exact.items() if measure.text is not None} == {
        "bleu": f" {PAIRS[0]['sw']} "
    }
    loop = answered("The school is the school is the school is the", "length")
    assert [loop[name].value for name in ("language", "empty", "repeated", "cut")] == [0, 0, 1, 1]
    empty = answered("  ", "stop")
    assert [empty[name].value for name in ("chrf++", "language", "empty", "repeated", "cut")] == [0, 0, 1, 0, 0]


def test_a_language_that_is_not_known_is_not_measured(pairs):
    (note,) = load_task(f"en-sw:{pairs},language=su").notes
    assert "not measured" in note and "'su'" in note and "\n" not in note
    assert "language" not in load_task(f"en-sw:{pairs},language=su").metrics
    known = load_task(f"en-sw:{pairs},language=sw_Latn")
    assert "language" in known.metrics
    assert known.notes[0].startswith("100.0% of the references") and "identified as sw;" in known.notes[0]
    assert "language" in load_task(f"sw-en:{pairs},language=su").metrics  # what it writes is English
    with pytest.raises(CogsymError, match="not measured"):
        load_task(f"en-sw:{pairs},language=su,metrics=language")


# A model's own values


@torch.inference_mode()
def plain_scores(model: Any, document: Document) -> list[Scored]:
    outcomes = []
    for request in document.requests:
        logits = model(torch.tensor([request.tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        targets = torch.tensor(request.tokens[request.first :])
        chosen = logits[request.first - 1 : -1].gather(1, targets[:, None])
        outcomes.append(Scored(chosen.sum().item(), False, len(targets)))
    return outcomes


def combined(task: Task, measures: list[list[Measure]]) -> dict[str, float]:
    sums = {m: np.array([row.statistics for rows in measures for row in rows if row.metric == m]) for m in task.metrics}
    return {metric: float(METRICS[metric].combine(rows.sum(0))) for metric, rows in sums.items()}


@pytest.mark.parametrize("context", [300, 9])
def test_bits_per_byte_is_that_of_training(model_folder, tmp_path, context):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    texts = sentences(30, seed=5)
    (tmp_path / "t.txt").write_text("\n".join(texts), "utf-8")
    task = load_task(f"text:{tmp_path / 't.txt'}")
    documents = task.documents(tokenizer, context, truncate=True)
    value = combined(task, [task.measure(document, plain_scores(model, document)) for document in documents])
    packed = pack(tokenize([Text(text) for text in texts], tokenizer, "all", tokenizer.eos_token_id), context, None)
    assert value["bits_per_byte"] == pytest.approx(bits_per_byte(model, packed), rel=1e-6)


def test_margins_are_those_of_training(model_folder, xcopa):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    task = load_task(f"xcopa-sw:{xcopa}")
    documents = task.documents(tokenizer, 200)
    value = combined(task, [task.measure(document, plain_scores(model, document)) for document in documents])
    questions = [(parts[0][0], [option for _, option in parts]) for parts in (read(tokenizer, d) for d in documents)]
    (a, b), (c, d) = option_log_probabilities(model, tokenizer, questions, tokenizer.eos_token_id)
    assert value["margin"] == pytest.approx(((a - b) + (d - c)) / 2, rel=1e-5)
    assert value["accuracy"] == ((a > b) + (d > c)) / 2


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
    base = load_task(f"xcopa-sw:{xcopa}").digest
    other = tmp_path / "elsewhere"
    other.mkdir()
    copy = other / "copy.jsonl"
    copy.write_bytes(xcopa.read_bytes())
    assert load_task(f"xcopa-sw:{copy}").digest == load_task(f"xcopa-sw:{xcopa},name=x").digest == base
    changed = [f"xcopa-sw:{xcopa},{s}" for s in ("limit=1", "shots=1", "metrics=margin", "label=label,separator=<end>")]
    changed.append(f"xcopa-id:{xcopa}")
    copy.write_bytes(xcopa.read_bytes().replace(b"njaa", b"kiu"))
    changed.append(f"xcopa-sw:{copy}")
    digests = [load_task(what).digest for what in changed]
    assert len({base, *digests}) == 1 + len(changed)


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
        assert load_task(f"tasks/{name}").digest == task.digest
        assert load_task(f"tasks/{name},data=pairs.jsonl#sw").digest == task.digest  # the command line's: from here
        assert load_task(f"tasks/{name}:pairs.jsonl#en,limit=2").num_documents == 2


def test_settings_on_the_command_line(pairs):
    line = rf"en-sw:{pairs},template=A, b: {{en}}\nC={{sw}},shots=1,language=no,metrics=[chrf++, cut],stops=END"
    settings = load_task(line).settings
    assert settings.template == r"A, b: {en}\nC={sw}" and settings.shots == 1
    assert settings.language == settings.output_language == "no"
    assert settings.metrics == ("chrf++", "cut") and settings.stops == ("END",)


def test_every_built_in_task_is_shipped_and_named_in_its_file():
    root = Path(task_files.__file__).parent / "builtin"
    assert set(task_files._BUILTIN) == {"belebele", "en-sw", "sw-en", "text", "xcopa-id", "xcopa-sw"}
    for name, path in task_files._BUILTIN.items():
        assert path.parent == root and f"{name}:" in path.read_text("utf-8")
        with pytest.raises(CogsymError, match=f"names no data; write the file after it, as in {name}:FILE"):
            load_task(name)


# Bad input

CHOICE = {"kind": "choice", "template": "{premise} {option}", "options": ["{choice1}", "{choice2}"]}
TRANSLATION = {"kind": "translation", "side": "production", "template": "{en} = {sw}", "metrics": ["bits_per_byte"]}
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
