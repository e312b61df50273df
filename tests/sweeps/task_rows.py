"""Rows that tests of tasks ask about, and what they read off a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from cogsym.sweeps.engine.requests import Score, Scored, TaskDocument
from cogsym.sweeps.tasks.metrics import METRICS
from cogsym.sweeps.tasks.task import Measure

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
TRANSLATION = {"kind": "translation", "side": "production", "template": "{en} = {sw}", "metrics": ["bits_per_byte"]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(tokenizer: PreTrainedTokenizerFast, document: TaskDocument) -> list[tuple[str, str]]:
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
