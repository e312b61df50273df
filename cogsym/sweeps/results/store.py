"""Results of a sweep on disk: rows that a kill leaves whole, and what they say with what certainty."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import Timeout

from cogsym.errors import CogsymError, RunStopped
from cogsym.ranks import ALONE, Ranks
from cogsym.records import FolderLock, differences, read_record, reason, remove_leftovers, write_record
from cogsym.sweeps.layers.configurations import Configuration
from cogsym.sweeps.results.bootstrap import paired_bootstrap
from cogsym.sweeps.results.parts import (
    NAME,
    SCHEMA,
    Part,
    clean,
    list_parts,
    merge,
    read_key_of,
    read_parts,
    write_part,
)
from cogsym.sweeps.tasks.aggregations import metric_of
from cogsym.sweeps.tasks.kinds import Side
from cogsym.sweeps.tasks.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_KEY = "sweep.json"
_LOCK = "sweep.lock"  # of the first rank; of others sweep-1.lock, sweep-2.lock ...
_APPENDS = 10**6  # numbers of appends that each of several ranks has in a run, so that none is two ranks'
_OF_A_RUN = ("train.lock", "settings.json", "checkpoints")  # in the folder of a training run
_DESCRIBED = ["task", "language", "side", "metric", "configuration", "direction", "k"]


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one document under one configuration.

    Attributes:
        configuration: what the layers did.
        task: the task's name.
        language: of the task.
        side: whether the task asks what the model understands or what it says.
        document: the document's key, unique in the task.
        metric: a name in `cogsym.sweeps.tasks.metrics.METRICS`, or "acc,none" and the like of lm-evaluation-harness.
        value: the metric of this document alone.
        statistics: summed over documents they give the metric of all of them; as many in every row of a metric.
        text: what the model wrote, where it wrote; of a task of lm-evaluation-harness all responses, as JSON.
    """

    configuration: Configuration
    task: str
    language: str
    side: Side
    document: str
    metric: str
    value: float
    statistics: tuple[float, ...]
    text: str | None = None


class Results:
    """The results of one model's sweep, open for writing; `open` makes it.

    OUT/sweep.json holds the key, OUT/results/ the parts of `cogsym.sweeps.results.parts`. What was appended is there
    whatever moment a kill comes, and nothing else is.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], lock: FolderLock, parts: Sequence[Part], number: int
    ) -> None:
        self._folder, self._key, self._lock = folder, key, lock
        self._parts, self._number = [*parts], number

    @classmethod
    def open(
        cls,
        folder: str | Path,
        key: Mapping[str, Any],
        *,
        resume: bool = False,
        ranks: Ranks = ALONE,
        digest: Callable[[str, int], str] | None = None,
    ) -> Results:
        """Make a folder ready for results, or go on with those it holds.

        Args:
            folder: OUT, made where it is missing.
            key: what a result depends on beside its configuration, as JSON has it: "revision" (a hash of the weights),
                "tasks" (name -> the data's hash as "data", how many "documents" these are, and the task's settings),
                whatever else there is, and "model", a name. A resumed sweep may name the same weights differently and
                bring new tasks, and more documents behind those of a task.
            resume: go on with what is there.
            ranks: those that write there, each parts of its own.
            digest: (a task's name, so many of its first documents) -> the "data" of these; without it all documents
                are to be those that were asked before.

        Raises:
            CogsymError: it cannot be written, holds results and `resume` is False, holds none and it is True, was
                made with another key, or is being written by another process.
        """
        folder = Path(folder)
        lock = FolderLock(folder / (_LOCK if ranks.first else f"sweep-{ranks.rank}.lock"))

        def first() -> tuple[dict[str, Any], list[Part]]:
            check_started(folder, resume)
            _part_folder(folder).mkdir(parents=True, exist_ok=True)
            lock.acquire()
            for other in folder.glob("sweep-*.lock"):  # a rank that has outlived the first one of its sweep
                FolderLock(other).try_out()
            remove_leftovers(folder / _KEY)
            clean(_part_folder(folder))
            agreed = _agreed(folder, json.loads(json.dumps(key)), digest)
            write_record(folder / _KEY, agreed, partial(_check_held, folder, lock))
            return agreed, list_parts(_part_folder(folder))

        def others() -> None:
            if not ranks.first:
                lock.acquire()

        def done(work: Callable[[], T]) -> T:
            try:
                return work()
            except Timeout as error:
                raise CogsymError(
                    f"Another sweep is writing to {folder}; wait for it, or choose another --out."
                ) from error
            except OSError as error:
                raise CogsymError(
                    f"The folder {folder} cannot be written ({reason(error)}); choose another --out."
                ) from error

        try:
            key, parts = ranks.on_first(partial(done, first))
            ranks.agreed(partial(done, others))
        except BaseException:
            lock.release()
            raise
        number = parts[-1].last + 1 if parts else 0
        if ranks.size == 1:
            return cls(folder, key, lock, parts, number)
        return cls(folder, key, lock, [], (-(-number // _APPENDS) + ranks.rank) * _APPENDS)

    def append(self, rows: Sequence[Row]) -> None:
        """Commit rows, all of them or, where it fails or is killed, none.

        Everything that is measured of a document under a configuration belongs into one call: `done` asks no further.

        Raises:
            RunStopped: they could not be written; what was appended before is intact.
        """
        if not rows:
            return
        check = partial(_check_held, self._folder, self._lock)
        check()
        folder, number = _part_folder(self._folder), self._number
        table = _table(rows, self._key["model"], self._key["revision"])
        try:
            self._parts.append(write_part(folder, number, number, table, self._key, check))
        except OSError as error:
            raise RunStopped(
                f"Results were not written to {folder} ({reason(error)}); those before are intact, free some space and "
                "run again with --resume."
            ) from error
        self._number += 1
        self._parts = merge(folder, self._parts, self._key, check)

    def done(self, task: str) -> set[tuple[str, str]]:
        """The (configuration code, document key) pairs that need not be asked again."""
        names = ["configuration", "document"]
        pairs: set[tuple[str, str]] = set()
        for table in read_parts(_part_folder(self._folder), [*names, "task"]):
            table = table.filter(pc.equal(table.column("task").cast(pa.string()), task))
            pairs.update(zip(*(table.column(name).to_pylist() for name in names), strict=True))
        return pairs

    def close(self) -> None:
        """Let another process write here."""
        self._lock.release()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_held(folder: Path, lock: FolderLock) -> None:
    if not lock.held():
        raise RunStopped(
            f"{folder} was removed or replaced while the sweep was writing to it, so nothing more is written there; "
            "start again with another --out."
        )


def check_started(folder: str | Path, resume: bool) -> None:
    """Refuse a folder that holds results where it should not, or none where it should.

    Raises:
        CogsymError: that.
    """
    folder = Path(folder)
    parts = list_parts(_part_folder(folder))
    if not (folder / _KEY).exists() and any((folder / name).exists() for name in _OF_A_RUN):
        raise CogsymError(f"{folder} holds a training run, expected a folder of the sweep's own; choose another --out.")
    if resume and not (parts or (folder / _KEY).exists()):
        raise CogsymError(f"There is no sweep in {folder} to resume; leave --resume out to start one.")
    if not resume and parts:
        raise CogsymError(f"{folder} holds results already; continue them with --resume, or choose another --out.")


def read_key(folder: str | Path) -> dict[str, Any]:
    """The key of the sweep in a folder; from its last part, where sweep.json is damaged.

    Raises:
        CogsymError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    try:
        return read_record(folder / _KEY)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if parts := list_parts(_part_folder(folder)):
            return read_key_of(parts[-1])
        raise CogsymError(f"{folder} holds no results; give the folder that a sweep wrote, its --out.") from error
    except OSError as error:
        raise CogsymError(f"{folder / _KEY} cannot be read ({reason(error)}); mend that and try again.") from error


def frame(folder: str | Path) -> pd.DataFrame:
    """Every row in a folder, in the order of writing.

    Returns:
        a column for each field of `Row`, with "configuration" as its code, and "model", "revision", "direction" and
        "k", the number of layers that are not kept.

    Raises:
        CogsymError: there are no results, or a part is damaged.
    """
    table = _everything(folder)
    plain = [pa.string() if field.type == NAME else field.type for field in SCHEMA]
    return table.cast(pa.schema(list(zip(SCHEMA.names, plain, strict=True)))).to_pandas()


def values(folder: str | Path, task: str, metric: str) -> dict[str, float]:
    """A metric of all documents of a task together, by the configuration's code.

    Raises:
        CogsymError: there are no results, or a part is damaged.
    """
    table = _everything(folder)
    combine = metric_of(_tasks(folder).get(task, {}), metric).combine
    for name, wanted in (("task", task), ("metric", metric)):
        table = table.filter(pc.equal(table.column(name).cast(pa.string()), wanted))
    found: dict[str, float] = {}
    for cells in _cells(table):
        together = combine(cells.statistics.sum(axis=0))
        found |= {line["configuration"]: float(value) for line, value in zip(cells.described, together, strict=True)}
    return found


def summary(folder: str | Path, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What the documents of each task give together, with the 95 % intervals of `paired_bootstrap`.

    Returns:
        a line for each task, metric and configuration, with what these are in `frame`; "documents", how many there
        are; their "value" with "low" and "high"; "difference" from the model with every layer kept, on the documents
        that both have, with "difference_low" and "difference_high", NaN where that model was not run; and "chance",
        what guessing gives, NaN where that is nothing.

    Raises:
        CogsymError: there are no results, or a part is damaged.
    """
    import pandas as pd

    summaries, tasks = [], _tasks(folder)
    for cells in _cells(_everything(folder)):
        described = tasks.get(cells.described[0]["task"], {})
        if cells.metric not in METRICS and "metrics" not in described:
            raise CogsymError(
                f"{folder} has results of the metric {cells.metric!r}, expected one of {', '.join(METRICS)}; it was "
                "written by another version of cogsym."
            )
        metric = metric_of(described, cells.metric)
        kept = next((c for c, line in enumerate(cells.described) if line["direction"] == "none"), None)
        estimates = paired_bootstrap(cells.statistics, cells.present, kept, metric.combine, resamples, seed)
        estimates["chance"] = (
            metric.chance(cells.statistics.sum(axis=0)) if metric.chance else np.full(len(estimates["value"]), np.nan)
        )
        summaries.append(pd.concat([pd.DataFrame(cells.described), pd.DataFrame(estimates)], axis=1))
    return pd.concat(summaries, ignore_index=True)


@dataclass(frozen=True, slots=True)
class _Cells:
    """One metric of one task: D documents under C configurations, with S statistics.

    Attributes:
        metric: its name.
        described: of each configuration, what its lines in a summary begin with.
        statistics: [D, C, S] float64, 0 where there is no result.
        present: [D, C] bool, whether there is one.
    """

    metric: str
    described: list[dict[str, Any]]
    statistics: np.ndarray
    present: np.ndarray


def _cells(table: pa.Table) -> Iterator[_Cells]:
    (tasks, task_names), (metrics, metric_names) = _codes(table, "task"), _codes(table, "metric")
    (configurations, _), (documents, keys) = _codes(table, "configuration"), _codes(table, "document")
    lists = table.column("statistics").combine_chunks()
    offsets, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
    for task in range(len(task_names)):
        of_task = np.flatnonzero(tasks == task)
        # By name, so that resamples do not depend on the order in which documents were run, nor on the metric.
        order = sorted(np.unique(documents[of_task]), key=lambda d: keys[d])
        place = np.empty(len(keys), dtype=np.int64)
        place[order] = np.arange(len(order))
        for metric in np.unique(metrics[of_task]):
            rows = of_task[metrics[of_task] == metric]
            _, first, columns = np.unique(configurations[rows], return_index=True, return_inverse=True)
            cell = place[documents[rows]], columns
            size = int(offsets[rows[0] + 1] - offsets[rows[0]])
            statistics = np.zeros((len(order), len(first), size))
            present = np.zeros((len(order), len(first)), dtype=bool)
            statistics[cell] = flat[offsets[rows][:, None] + np.arange(size)]
            present[cell] = True
            yield _Cells(
                metric_names[metric], table.select(_DESCRIBED).take(rows[first]).to_pylist(), statistics, present
            )


def _table(rows: Sequence[Row], model: str, revision: str) -> pa.Table:
    described = {c: (c.code, c.direction, c.k) for c in {row.configuration for row in rows}}
    code, direction, k = zip(*(described[row.configuration] for row in rows), strict=True)
    columns: dict[str, Sequence[Any]] = {
        "model": [model] * len(rows),
        "revision": [revision] * len(rows),
        "configuration": code,
        "direction": direction,
        "k": k,
    }
    for name in SCHEMA.names[len(columns) :]:
        columns[name] = [getattr(row, name) for row in rows]
    return pa.table(columns, schema=SCHEMA)


def _codes(table: pa.Table, name: str) -> tuple[np.ndarray, list[str]]:
    """A column of names as numbers into a list of them."""
    column = table.column(name).combine_chunks()
    return column.indices.to_numpy(), column.dictionary.to_pylist()


def _agreed(folder: Path, key: dict[str, Any], digest: Callable[[str, int], str] | None) -> dict[str, Any]:
    """The key of all that a folder will hold: the one it has, with the tasks and documents that are new."""
    if not list_parts(_part_folder(folder)):
        return key
    before = read_key(folder)
    if before["revision"] == key["revision"]:
        key = {**key, "model": before["model"]}  # the same weights, wherever they lie now
    tasks = {**before["tasks"], **key["tasks"]}
    parts = [differences({**before, "tasks": None}, {**key, "tasks": None})]
    for name, asked in before["tasks"].items():
        now = tasks[name]
        if digest and now.get("documents", 0) > (number := asked.get("documents", 0)):
            now = {**now, "data": digest(name, number), "documents": number}
        if change := differences(asked, now):
            parts.append(f"{change} in {name}")
    different = ", ".join(filter(None, parts))
    if before["revision"] != key["revision"]:
        raise CogsymError(f"{folder} holds results of another model: {different}; choose another --out.")
    if different:
        raise CogsymError(
            f"The sweep in {folder} was started with {different}; resume it with the same, or choose another --out."
        )
    return {**key, "tasks": tasks}


def _everything(folder: str | Path) -> pa.Table:
    tables = read_parts(_part_folder(Path(folder)))
    if not tables:
        raise CogsymError(f"{folder} holds no results; give the folder that a sweep wrote, its --out.")
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _tasks(folder: str | Path) -> dict[str, Any]:
    """What the key says of each task."""
    return read_key(folder)["tasks"]


def _part_folder(folder: Path) -> Path:
    return folder / "results"
