"""The picture of a run says what it cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogsym.training import curves

LINES: list[dict[str, float]] = [
    {"step": 0, "tokens": 0, "eval_sw_bits_per_byte": 3.0},
    {"step": 10, "tokens": 5000, "loss": 2.0},
    {"step": 20, "tokens": 10000, "loss": 1.0, "eval_sw_bits_per_byte": 2.0},
]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What stands in the axes of the picture of a history."""

    def drawn(history: list[dict[str, float]]) -> list[list[str]]:
        saved: list[Any] = []
        monkeypatch.setattr(curves, "save", lambda figure, paths: saved.append(figure))
        curves.plot_curves(history, Path("loss.png"))
        return [[text.get_text() for text in axis.texts] for axis in saved[0].axes]

    return drawn


def test_a_curve_of_one_point_says_so(words: Any) -> None:
    assert words(LINES) == [[], []]
    assert words(LINES[:2]) == [["one point is no curve"], ["one point is no curve"]]
    assert words([LINES[1]]) == [["one point is no curve"]]
    assert words(LINES[:1]) == [["nothing was measured"], ["one point is no curve"]]
