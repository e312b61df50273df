"""What tasks make of the answers: by hand, and as training measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps.task_rows import PAIRS, by_metric, read, scored
from texts import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from cogsym.data import Document as Text
from cogsym.data import pack, tokenize
from cogsym.errors import CogsymError
from cogsym.sweeps.engine.requests import Generated, Scored, TaskDocument
from cogsym.sweeps.tasks.metrics import METRICS
from cogsym.sweeps.tasks.task import Measure, Task, load_task
from cogsym.training.evaluate import bits_per_byte, option_log_probabilities


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
    in_swahili = answered(f"{PAIRS[0]['sw']} " * 4, "length")
    assert [in_swahili[name].value for name in ("language", "empty", "repeated", "cut")] == [0, 0, 1, 1]
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


@torch.inference_mode()
def plain_scores(model: Any, document: TaskDocument) -> list[Scored]:
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


def test_a_language_that_is_no_code_is_told(pairs: Path) -> None:
    notes = load_task(f"text:{pairs}#sw,language=zz").notes
    assert notes == [
        "The language 'zz' of task text:pairs.jsonl#sw is no code of ISO 639-1; results carry it as it is."
    ]
    assert all(load_task(f"text:{pairs}#sw,language={code}").notes == [] for code in ("sw", "swh", "sw_Latn", "pt-BR"))
