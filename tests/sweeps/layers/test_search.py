"""Searches for layers that can go, as sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweeps.runs import L, asked, assert_same_rows, plain_rows

from cogsym import Configuration, RunStopped, SweepSettings
from cogsym.sweeps import runner as module
from cogsym.sweeps.results.parts import list_parts


@pytest.mark.parametrize(("number", "better"), [(0, min), (1, max)])
def test_greedy_removes_what_is_missed_least(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: int, better: Any,
) -> None:  # fmt: skip
    """Bits per byte are to stay low, a margin high; the choice of each round is that of plain models."""
    task = {**tasks[number], "metrics": ["bits_per_byte" if better is min else "margin"]}
    forwards: list[float] = []
    progress = module.SweepProgress.forwards
    monkeypatch.setattr(module.SweepProgress, "forwards", lambda s, n: (forwards.append(n), progress(s, n))[0])
    told = sweep("greedy", [task], settings=SweepSettings(remove=3))
    said = sweep.said  # type: ignore[attr-defined]
    assert "10 configurations in 3 rounds" in said
    # The whole model and those without one layer: 4 + 3 + 2 + 1. Then, of R left, (R - 1)(R + 2) / 2.
    assert sum(forwards) == planned(said) == 10 + 5 + 2
    gone: list[int] = []
    for _ in range(3):
        tried = {i: Configuration.of(L, {"skip": [*gone, i]}) for i in range(L) if i not in gone}
        rows = plain_rows(model_folder, list(tried.values()), [task])
        sums: dict[str, Any] = {}
        for (code, *_), measure in rows.items():
            sums[code] = sums.get(code, 0) + np.array(measure.statistics)
        best = better(tried, key=lambda i: sums[tried[i].code][0] / sums[tried[i].code][1])
        gone.append(best)
        assert f"layer {best} goes: " in said
    assert f"{told['configuration'].nunique()}" == "10"
    assert not asked(sweep, monkeypatch, "greedy", [task], settings=SweepSettings(remove=3), resume=True)
    fourth = asked(sweep, monkeypatch, "greedy", [task], settings=SweepSettings(remove=4), resume=True)
    assert {code for _, _, code in fourth} == {"ssss"}


def test_beam_follows_the_best_two(
    sweep: Callable[..., Any], tasks: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choices of each round are those of plain models, and cost at most what the plan says."""
    task = {**tasks[0], "metrics": ["bits_per_byte"], "limit": 3}
    forwards: list[float] = []
    progress = module.SweepProgress.forwards
    monkeypatch.setattr(module.SweepProgress, "forwards", lambda s, n: (forwards.append(n), progress(s, n))[0])
    told = sweep("beam", [task], settings=SweepSettings(remove=3, width=2))
    said = sweep.said  # type: ignore[attr-defined]
    assert "at most 15 configurations in 3 rounds" in said  # 1 + 4, then twice 3 and twice 2
    assert sum(forwards) <= 10 + 2 * 5 + 2 * 2
    assert "layer-forwards: at most 24," in said
    beam: list[tuple[int, ...]] = [()]
    for _ in range(3):
        sets = {tuple(sorted((*gone, i))) for gone in beam for i in range(L) if i not in gone}
        tried = {gone: Configuration.of(L, {"skip": gone}) for gone in sets}
        sums: dict[str, Any] = {}
        for (code, *_), measure in plain_rows(model_folder, list(tried.values()), [task]).items():
            sums[code] = sums.get(code, 0) + np.array(measure.statistics)
        beam = sorted(tried, key=lambda gone: sums[tried[gone].code][0] / sums[tried[gone].code][1])[:2]
        assert f"best is {tried[beam[0]]}: bits per byte" in said
        assert {c.code for c in tried.values()} <= set(told["configuration"])
    assert not asked(sweep, monkeypatch, "beam", [task], settings=SweepSettings(remove=3, width=2), resume=True)


def planned(said: str) -> float:
    return float(said.partition("layer-forwards: ")[2].partition(",")[0])


def test_greedy_goes_on_where_it_was_killed(
    sweep: Callable[..., Any], tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the layers go by default, and halves of layers may."""
    settings = SweepSettings(action="skip_mlp", memory_budget=1)
    sweep("greedy", tasks, settings=settings, out=tmp_path / "whole")
    want = [line for line in sweep.said.splitlines() if "goes" in line]  # type: ignore[attr-defined]
    assert len(want) == 2
    assert list_parts(tmp_path / "whole" / "results")[-1].last + 1 == 2 * 18  # appends
    for number in (3, 20):
        append, left = module.Results.append, iter(range(number))

        def dying(self: Any, rows: Any, append: Any = append, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            append(self, rows)

        with monkeypatch.context() as patch, pytest.raises(RunStopped, match="--resume"):
            patch.setattr(module.Results, "append", dying)
            sweep("greedy", tasks, settings=settings, out=tmp_path / str(number))
        sweep("greedy", tasks, settings=settings, out=tmp_path / str(number), resume=True)
        assert [line for line in sweep.said.splitlines() if "goes" in line] == want  # type: ignore[attr-defined]
        assert_same_rows(tmp_path / str(number), tmp_path / "whole")
