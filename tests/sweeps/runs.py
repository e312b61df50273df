"""What tests of whole sweeps share: their rows, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeps.plain import greedy_tokens, log_probabilities, plain_model

from cogsym import Configuration, SweepSettings
from cogsym.models.loading import load_model, load_tokenizer
from cogsym.sweeps import runner as module
from cogsym.sweeps.engine.requests import Score, Scored
from cogsym.sweeps.engine.sampling import Stops
from cogsym.sweeps.results.store import frame
from cogsym.sweeps.tasks.task import load_task

L, CONTEXT = 4, 64
SMALL = SweepSettings(memory_budget=1)  # a document a piece


def by_row(folder: Path) -> Any:
    told = frame(folder)
    names = ["configuration", "task", "document", "metric"]
    assert not told.duplicated(names).any()
    return told.fillna({"text": ""}).set_index(names).sort_index()


def assert_same_rows(a: Path, b: Path) -> None:
    one, other = by_row(a), by_row(b)
    assert one.index.equals(other.index)
    assert one["value"].to_numpy().tobytes() == other["value"].to_numpy().tobytes()
    assert [tuple(s) for s in one["statistics"]] == [tuple(s) for s in other["statistics"]]
    assert one["text"].tolist() == other["text"].tolist()


def asked(sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *args: Any, **more: Any) -> set[Any]:
    """The (task, document, configuration) that a sweep computes."""
    pairs: list[Any] = []
    rows = module._Sweep._rows

    def watched(self: Any, task: Any, piece: Any, trie: Any) -> Any:
        pairs.extend((task.name, d.key, c.code) for d in piece for c in trie.configurations)
        return rows(self, task, piece, trie)

    with monkeypatch.context() as patch:
        patch.setattr(module._Sweep, "_rows", watched)
        sweep(*args, **more)
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def plain_rows(folder: Path, chosen: list[Configuration], tasks: Any, base: Any = None) -> dict[Any, Any]:
    """(configuration, task, document, metric) -> Measure, from a model of its own for each configuration."""
    whole, tokenizer = load_model(folder), load_tokenizer(folder)
    stops, rows = Stops(tokenizer, [tokenizer.eos_token_id]), {}
    for configuration in chosen:
        model = plain_model(whole, configuration, base).eval()
        for task in map(load_task, tasks):
            for document in task.documents(tokenizer, CONTEXT):
                outcomes: list[Any] = []
                for request in document.requests:
                    if isinstance(request, Score):
                        log_p = log_probabilities(model, request.tokens)[request.first - 1 :]
                        outcomes.append(Scored(float(log_p.sum()), False, len(log_p)))
                        continue
                    tokens = greedy_tokens(model, request.tokens, request.max_new_tokens, tokenizer.eos_token_id)
                    ends = (stops.ended(request, tokens[: i + 1]) for i in range(len(tokens)))
                    outcomes.append(next(end for end in ends if end is not None))
                for measure in task.measure(document, outcomes):
                    rows[configuration.code, task.name, document.key, measure.metric] = measure
    return rows
