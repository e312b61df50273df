"""Time for the trials, and what became of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

import pytest
from faults.workloads import Sweep, Train, Workload

_TOLD = pytest.StashKey[dict[tuple[str, str], Counter[str]]]()
_HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def workloads(_model_folder: Path, _text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workload]:
    """The two that are disturbed, each measured undisturbed."""
    made: dict[str, Workload] = {"train": Train(_model_folder, _text_file), "sweep": Sweep(_model_folder, _text_file)}
    for name, workload in made.items():
        workload.measure(tmp_path_factory.mktemp(name))
    return made


@pytest.fixture
def told(request: pytest.FixtureRequest, fault: str, name: str) -> Counter[str]:
    """Counts of a kind of fault in a workload, for the summary."""
    return request.config.stash.setdefault(_TOLD, {}).setdefault((fault, name), Counter())


@pytest.fixture
def turns(request: pytest.FixtureRequest, workloads: dict[str, Workload]) -> Iterator[int]:
    """Numbers of trials, one at least, for as long as this test may take."""
    tests = sum(_HERE in item.path.parents for item in request.session.items)
    until = time.monotonic() + 60 * request.config.getoption("minutes") / tests
    return takewhile(lambda n: n == 0 or time.monotonic() < until, count())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    told = {of: counts for of, counts in config.stash.get(_TOLD, {}).items() if counts}
    if not told:
        return
    terminalreporter.section("faults")
    every = sum(told.values(), Counter())
    for (fault, name), counts in sorted(told.items()):
        ends = ", ".join(f"{how} {n}" for how, n in sorted(counts.items()) if how not in ("faults", "survived"))
        terminalreporter.write_line(
            f"{fault:<16} {name:<6} {counts['faults']:>5} faults {counts['survived']:>5} survived  ({ends})"
        )
    terminalreporter.write_line(f"{every['faults']} faults, {every['survived']} survived")
