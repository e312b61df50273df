"""The look of every picture: colours told apart with any colour vision, bare axes, files that come out the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, without the yellow, which is too pale for a line on white.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
GREY = "#999999"


def strip(axis: Axes) -> None:
    """Leave only the spines that carry ticks."""
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, paths: Iterable[Path]) -> None:
    """Write files, in the format of each suffix; the same figure gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "cogsym"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
