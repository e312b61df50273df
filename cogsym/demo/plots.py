"""The demo's picture: the new language while it is learnt, and perception, production and retention in the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cogsym.plotting import BLUE, GREEN, GREY, VERMILION, save, strip

COLOURS = {"before": GREY, "cogsym": GREEN, "cogsym-embeddings": BLUE, "full": VERMILION}


def plot(report: dict[str, Any], labels: Mapping[str, str], *paths: Path) -> None:
    """Draw a report of `cogsym.demo.comparison`.

    Args:
        report: what `run_demo` returns.
        labels: what "before" and the methods are called.
        paths: files to write, in the format of each suffix.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1.7, 1, 1, 1))
    _draw_curves(axes[0], report, labels)
    for axis, key, scale, title, unit, pattern in (
        (
            axes[1],
            "accuracy",
            100,
            "Perception",
            f"right meaning among {round(1 / report['chance'])}, %\n(dotted: chance)",
            "{:.0f}",
        ),
        (axes[2], "chrf", 1, "Production", f"chrF++, English to {report['language']}", "{:.0f}"),
        (axes[3], "base_bits_per_byte", 1, "Retention", "bits per byte of English\n(less is better)", "{:.2f}"),
    ):
        values = [report["scores"][name][key] * scale for name in labels]
        _draw_bars(axis, values, labels, title, unit, pattern)
    axes[1].axhline(100 * report["chance"], color="black", linewidth=1, linestyle=":", zorder=0)
    for axis in axes[1:3]:
        axis.set_ylim(0, 109)
    save(figure, paths)


def _draw_curves(axis: Axes, report: dict[str, Any], labels: Mapping[str, str]) -> None:
    for name, training in report["training"].items():
        points = [(point["tokens"] / 1000, point["bits_per_byte"]) for point in training["curve"]]
        axis.plot(*zip(*points, strict=True), color=COLOURS[name], label=labels[name], marker="o", markersize=3)
    axis.axhline(report["floor_bits_per_byte"], color="black", linewidth=1, linestyle=":", label="best possible")
    axis.set_title(f"Learning {report['language']}", loc="left", weight="bold")
    axis.set(xlabel="thousand training tokens", ylabel=f"bits per byte of unseen {report['language']}")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    strip(axis)


def _draw_bars(axis: Axes, values: list[float], labels: Mapping[str, str], title: str, unit: str, pattern: str) -> None:
    bars = axis.bar(range(len(values)), values, color=[COLOURS[name] for name in labels], width=0.7)
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a value may stand on the line of chance
    axis.bar_label(bars, [pattern.format(value) for value in values], padding=3, bbox=background, zorder=3)
    axis.set_xticks(range(len(values)), [label.replace(" ", "\n", 1) for label in labels.values()])
    axis.set_title(title, loc="left", weight="bold")
    axis.set_ylabel(unit)
    axis.margins(y=0.12)
    strip(axis)
