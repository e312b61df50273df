"""What lm-evaluation-harness says of each configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogsym.errors import CogsymError
from cogsym.records import write_whole
from cogsym.sweeps.results.store import frame
from cogsym.sweeps.tasks.harness import HarnessTask
from cogsym.sweeps.tasks.loading import LoadedTask

FILE = "lm_eval.json"


def write_harness_results(folder: str | Path, asked: Sequence[LoadedTask]) -> None:
    """Write OUT/lm_eval.json: for each configuration what the harness's own `simple_evaluate` has as "results".

    Args:
        folder: OUT of the sweep.
        asked: the sweep's tasks; where none is of the harness, nothing is written.
    """
    tasks = [task for task in asked if isinstance(task, HarnessTask)]
    if not tasks:
        return
    answers = _answers(folder)
    configurations = dict.fromkeys(code for code, _, _ in answers)
    results = {code: _results(tasks, code, answers) for code in configurations}
    write_whole(Path(folder) / FILE, json.dumps(results, indent=1).encode())


def answers_of(folder: str | Path, code: str) -> dict[str, Any]:
    """fingerprint -> response, of every task of the harness under the configuration of a code.

    Raises:
        CogsymError: there are none.
    """
    answers = _answers(folder)
    found = {name: said for (c, _, _), responses in answers.items() if c == code for name, said in responses.items()}
    if not found:
        codes = ", ".join(dict.fromkeys(c for c, _, _ in answers)) or "none"
        raise CogsymError(
            f"{folder} has no answers to lm-evaluation-harness of the configuration {code!r}; it has those of {codes}."
        )
    return found


def _answers(folder: str | Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(configuration, task, document) -> responses by fingerprint, of tasks of the harness."""
    rows = frame(folder)
    rows = rows[rows["text"].notna() & rows["text"].str.startswith('{"', na=False)]
    names = ("configuration", "task", "document", "text")
    return {(c, t, d): json.loads(text) for c, t, d, text in zip(*(rows[name] for name in names), strict=True)}


def _results(
    tasks: Sequence[HarnessTask], code: str, answers: Mapping[tuple[str, str, str], Mapping[str, Any]]
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for task in tasks:
        listed: dict[str, list[Any]] = {}
        for key in task.keys:
            responses = answers.get((code, task.name, key))
            for name, item in (task.items(key, responses) if responses is not None else {}).items():
                listed.setdefault(name, []).append(item)
        if listed:
            results[task.name] = {"alias": task.name, "sample_len": max(map(len, listed.values()))} | {
                name: task.aggregate(name, items) for name, items in listed.items()
            }
    for group in {group.name: group for task in tasks for group in task.groups}.values():
        if all(leaf.task_name in results for leaf in group.get_all_tasks()):
            results[group.name] = group.aggregate(results)
    return results
