"""The tasks of a sweep, from what a user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogsym.errors import CogsymError
from cogsym.sweeps.tasks.harness import PREFIX, HarnessTask, load_harness
from cogsym.sweeps.tasks.task import Task, load_task

LoadedTask = Task | HarnessTask


def load_tasks(tasks: Sequence[str | Path | Mapping[str, Any]], separator: str | None = None) -> list[LoadedTask]:
    """Tasks with their data read.

    Args:
        tasks: each as `cogsym.sweeps.tasks.task.load_task` takes it, or "lm_eval:NAME", one or several of
            lm-evaluation-harness, as `cogsym.sweeps.tasks.harness` tells.
        separator: the token before each document, where a task does not name one; the harness has its own.

    Raises:
        CogsymError: there is none, two have one name, or one of them or its data are not as they should be.
    """
    loaded: list[LoadedTask] = []
    for task in tasks:
        of_harness = isinstance(task, str) and task.startswith(PREFIX)
        loaded += load_harness(str(task)) if of_harness else [load_task(task, separator)]
    if not loaded:
        raise CogsymError("The sweep was given no task; name at least one, such as text:news.jsonl#sw.")
    names = [task.name for task in loaded]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise CogsymError(f"Two tasks are named {repeated[0]}; give one of them another name=.")
    return loaded
