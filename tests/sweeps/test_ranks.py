"""`cogsym sweep` on two ranks: the rows of one process, a rank lost, gone on with by another number of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launched import Launched, sentences
from sweeps.runs import SMALL, by_row

from cogsym import SweepSettings
from cogsym.sweeps.results.parts import list_parts


@pytest.fixture
def files(tasks: Any, tmp_path: Path) -> list[Any]:
    """The tasks as files, which a command line names."""
    paths = []
    for task in tasks[:2]:
        paths.append(tmp_path / f"{task['name']}.json")
        paths[-1].write_text(json.dumps(task))
    return paths


def words(model: Path, files: list[Path], out: Path, *more: object) -> list[object]:
    tasks = [part for path in files for part in ("--task", path)]
    return ["sweep", model, *tasks, "--out", out, "--memory", "1MB", *more]


def assert_close_rows(one: Path, other: Path) -> None:
    """Other documents are asked together, which rounds otherwise."""
    a, b = by_row(one), by_row(other)
    assert a.index.equals(b.index)
    np.testing.assert_allclose(a["value"], b["value"], rtol=1e-5, atol=1e-5)
    assert a["text"].tolist() == b["text"].tolist()


def ranks_of(out: Path) -> set[int]:
    return {part.first // 10**6 for part in list_parts(out / "results")}


def test_two_ranks_write_the_rows_of_one_and_a_lost_one_is_gone_on_with(
    sweep: Callable[..., Any], files: list[Path], model_folder: Path, tmp_path: Path
) -> None:
    told = sweep("input", files, out=tmp_path / "one")
    two = tmp_path / "two"
    asked = words(model_folder, files, two, "--configs", "input")
    status, out, said = Launched(*asked).end()
    assert status == 0, said
    assert said.count("2 ranks share the documents out; progress is that of one of them\n") == 1
    assert "7/7 documents" in said and out.count("accuracy, every layer kept") == out.count("5 configurations in ") == 1
    assert ranks_of(two) == {0, 1}
    assert_close_rows(tmp_path / "one", two)

    # One of them dies, and what it did not write is shared out again.
    for part in list_parts(two / "results"):
        if part.first:
            part.path.unlink()
    kept = len(by_row(two))
    assert 0 < kept < len(by_row(tmp_path / "one"))
    status, _, said = Launched(*asked, "--resume", console_script=True).end()
    assert status == 0, said
    assert ranks_of(two) == {0, 1, 2}
    assert_close_rows(tmp_path / "one", two)
    again = sweep("input", files, out=two, resume=True, settings=SMALL)
    assert again["value"].to_numpy() == pytest.approx(told["value"].to_numpy(), rel=1e-4)


def test_a_rank_that_is_killed_ends_the_others_in_a_sentence(
    sweep: Callable[..., Any], files: list[Path], model_folder: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    launched = Launched(*words(model_folder, files, two, "--configs", "greedy", "--remove", 4))
    rank = launched.rank(1)
    launched.wait_until(lambda: bool(list_parts(two / "results")))
    os.kill(rank, signal.SIGKILL)
    status, _, said = launched.end()
    assert status != 0 and sentences(said) == 1
    assert "Another rank of this run has ended" in said or "The sweep was stopped; what " in said
    settings = SweepSettings(remove=4)
    sweep("greedy", files, out=tmp_path / "one", settings=settings)
    sweep("greedy", files, out=two, resume=True, settings=settings)
    assert_close_rows(tmp_path / "one", two)
