"""What a sweep says on its way."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from rich.console import Console

from cogsym.sweeps.progress import SweepProgress


@pytest.mark.parametrize("terminal", [False, True])
def test_time_left_knows_that_tasks_differ(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elapsed, then left; a document that is written takes as long as nine that are read."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=StringIO(), width=200, force_terminal=terminal)
    with SweepProgress(console, {"read": 12, "written": 2}, {"read": 1.0, "written": 9.0}) as progress:
        progress.documents("read", 2, computed=False)
        now = 10.0
        progress.forwards(50)
        progress.documents("read", 10, computed=True)
        now = 12.0
        progress.forwards(10)
        if not terminal:
            progress.documents("written", 2, computed=True)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    if terminal:
        assert "12/14 documents" in said and "5 layer-forwards/s" in said and "elapsed, 0:16 left" in said
    else:
        assert said.splitlines() == [
            "read: 12/14 documents, 5 layer-forwards/s, 0:10 elapsed, 0:18 left",
            "written: 14/14 documents, 5 layer-forwards/s, 0:12 elapsed, 0:00 left",
        ]
