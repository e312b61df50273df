"""The picture of a run: loss, and bits per byte of the held-out texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cogsym.plotting import COLOURS, GREY, save, strip


def plot_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Write the loss, and where there is any the bits per byte, over training tokens as a PNG.

    Args:
        history: the lines of metrics.jsonl.
        path: file to write.
    """
    held_out = sorted({key for line in history for key in line if key.endswith("_bits_per_byte")})
    figure = Figure(figsize=(9 if held_out else 5, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, 2 if held_out else 1, squeeze=False)[0]
    _draw(axes[0], history, "loss", "training loss, nats per token", COLOURS[0])
    for key, colour in zip(held_out, COLOURS, strict=False):
        label = key.removeprefix("eval_").removesuffix("_bits_per_byte")
        _draw(axes[1], history, key, "held-out text, bits per byte", colour, label)
    if held_out:
        axes[1].legend(frameon=False)
    save(figure, [path])


def _draw(axis: Any, history: Sequence[dict[str, float]], key: str, title: str, colour: str, label: str = "") -> None:
    points = [(line["tokens"] / 1000, line[key]) for line in history if key in line]
    if len(points) < 2:
        words = "one point is no curve" if points else "nothing was measured"
        axis.text(0.5, 0.9, words, transform=axis.transAxes, ha="center", color=GREY)
    axis.plot(
        *zip(*points, strict=True) if points else ([], []), color=colour, label=label, marker="o" * (len(points) < 20)
    )
    axis.set(xlabel="thousand training tokens", title=title)
    strip(axis)
    axis.grid(alpha=0.25)
