"""Pictures of a sweep: what is understood and what is said, against the layers that are missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from cogsym.errors import CogsymError
from cogsym.plotting import BLACK, BLUE, GREY, VERMILION, save, strip
from cogsym.records import reason
from cogsym.sweeps.layers.actions import ACTIONS, KEEP, SKIP
from cogsym.sweeps.results.store import read_key, summary
from cogsym.sweeps.tasks.aggregations import metric_of
from cogsym.sweeps.tasks.metrics import METRICS, Metric

if TYPE_CHECKING:
    import pandas as pd

# What is plotted unless metrics are named; the others tell why these are as they are.
_HEADLINES = ("accuracy", "log_likelihood", "bits_per_byte", "chrf++")
_CURVES = {"input": ("first k layers", BLUE, "o"), "output": ("last k layers", VERMILION, "s")}
_LOG_FROM = 8  # a panel whose values differ by this factor has a logarithmic axis
_CELLS = 4  # that a map has at least
_STEPS = (1, 2, 5, 10, 20, 50, 100)  # cells of a map from one named to the next
_TITLE = 29  # characters that fit above a panel


def plot(folder: str | Path, out: str | Path | None = None, metrics: Collection[str] = ()) -> list[Path]:
    """Draw what a sweep's results hold, each picture as PNG and SVG.

    "directions" has a panel for each task and metric, perception on the left and production on the right, with a curve
    for the first k layers and one for the last k, their 95 % intervals, the model with every layer and, where there is
    one, the level of chance. "grid" is a map of first against last layers, "layers" has single layers and "blocks"
    contiguous ones, where there are a few. "removed" is what a search or a list of configurations gives: each
    against how many layers are missing, and a curve through the best of each number. An action other than skip stands
    in the name: "directions-revert".

    Args:
        folder: OUT of the sweep.
        out: folder for the pictures; OUT by default.
        metrics: which ones; by default accuracy, log-likelihood, bits per byte and chrF++.

    Returns:
        the files.

    Raises:
        CogsymError: no results, none of these metrics, nothing among them that makes a picture, or `out` cannot be
            written.
    """
    folder, out = Path(folder), Path(out or folder)
    found = summary(folder)
    names = list(dict.fromkeys(found["metric"]))
    there = [*(name for name in METRICS if name in names), *(name for name in names if name not in METRICS)]
    for name in metrics:
        if name not in there:
            raise CogsymError(f"{folder} has no results of the metric {name!r}, expected one of {', '.join(there)}.")
    wanted = metrics or [name for name in there if name in _HEADLINES] or there
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(found[found["metric"].isin(wanted)], read_key(folder)["tasks"]):
            paths = [out / f"{name}{suffix}" for suffix in (".png", ".svg")]
            save(figure, paths)
            files += paths
    except OSError as error:
        raise CogsymError(f"The folder {out} cannot be written ({reason(error)}); choose another --out.") from error
    if not files:
        raise CogsymError(
            f"The configurations in {folder} are neither directions, a grid, single layers nor blocks, so there is no "
            "picture of them; cogsym.sweeps.results.store.summary has the numbers."
        )
    return files


def figures(found: pd.DataFrame, tasks: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Figure]]:
    """The pictures that a `summary` has the lines for, each with its name; `tasks` are those of the sweep's key."""

    def metric(task: str, name: str) -> Metric:
        return metric_of((tasks or {}).get(task, {}), name)

    kept = ACTIONS[KEEP].letter
    for action in ACTIONS:
        letter, label = ACTIONS[action].letter, ACTIONS[action].label
        if action == KEEP:
            continue
        lines = found[[set(code) <= {kept, letter} for code in found["configuration"]]]
        lines = lines.assign(
            front=[len(code) - len(code.lstrip(letter)) for code in lines["configuration"]],
            back=[len(code) - len(code.rstrip(letter)) for code in lines["configuration"]],
            first=[code.find(letter) for code in lines["configuration"]],
            last=[code.rfind(letter) for code in lines["configuration"]],
        )
        name = "" if action == SKIP else f"-{action}"
        directions = set(lines["direction"])
        if directions & set(_CURVES):
            yield f"directions{name}", _figure(lines, _draw_directions, label, 3.1, metric)
        ends = lines.loc[lines["direction"].isin(["none", "input", "output", "both"]), "configuration"]
        if "both" in directions and ends.nunique() >= _CELLS:
            yield f"grid{name}", _figure(lines, _draw_grid, label, 4.2, metric)
        if "single" in directions:
            yield f"layers{name}", _figure(lines, _draw_layers, label, 3.1, metric)
        contiguous = lines.loc[(lines["k"] > 0) & (lines["k"] == lines["last"] - lines["first"] + 1), "configuration"]
        if "block" in directions and contiguous.nunique() >= _CELLS:
            yield f"blocks{name}", _figure(lines, _draw_blocks, label, 4.2, metric)
        if "other" in directions and lines["k"].nunique() > 2:
            yield f"removed{name}", _figure(lines, _draw_removed, label, 3.1, metric)


def _figure(
    lines: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame, Metric, str], None],
    missing: str,
    height: float,
    metric: Callable[[str, str], Metric],
) -> Figure:
    """A panel for each task and metric, and one legend for all.

    Args:
        lines: of a summary.
        draw: draws one panel from its lines.
        missing: what the action did to the layers, such as "ablated".
        height: of a panel, inches.
        metric: of a task, by its name.
    """
    columns = [_panels(lines, side) for side in ("perception", "production")]
    if not all(columns):
        both = columns[0] or columns[1]
        columns = [both[::2], both[1::2]] if len(both) > 1 else [both]
    rows = max(map(len, columns))
    figure = Figure(figsize=(5 * len(columns), height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for place, axis in np.ndenumerate(axes):
        column = columns[place[1]]
        if place[0] >= len(column):
            axis.set_axis_off()
            continue
        panel = column[place[0]]
        one = panel.iloc[0]
        draw(axis, panel, metric(one["task"], one["metric"]), missing)
        axis.set_title(fill(f"{one['side'].capitalize()}: {one['task']}", _TITLE), loc="left", weight="bold")
        axis.set_title(f"n = {panel['documents'].max():,}", loc="right", fontsize="small", color="0.35")
    entries: dict[str, Artist] = {}
    for axis in figure.axes:  # scales of colour among them
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    across = 5 if len(columns) > 1 else 2
    figure.legend(entries.values(), list(entries), loc="outside upper center", ncols=across, frameon=False)
    return figure


def _panels(lines: pd.DataFrame, side: str) -> list[pd.DataFrame]:
    """The lines of each task and metric, tasks in order of their names and metrics in ours."""
    mine = lines[lines["side"] == side]
    groups = dict(list(mine.groupby(["metric", "task"], sort=True)))
    order = [*METRICS, *sorted(set(mine["metric"]) - set(METRICS))]
    return [groups[pair] for pair in sorted(groups, key=lambda pair: (order.index(pair[0]), pair[1]))]


def _draw_directions(axis: Axes, lines: pd.DataFrame, metric: Metric, missing: str) -> None:
    for direction, (label, colour, marker) in _CURVES.items():
        if direction in set(lines["direction"]):
            curve = lines[lines["direction"].isin([direction, "none", "all"])].sort_values("k")
            axis.fill_between(curve["k"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0, zorder=1.3)
            axis.plot(curve["k"], curve["value"], color=colour, marker=marker, markersize=3.5, label=label)
    axis.fill_between([], [], color=GREY, alpha=0.4, linewidth=0, label="95 % interval")
    _draw_levels(axis, lines)
    axis.set_xlabel(f"k layers {missing}, of {len(lines['configuration'].iloc[0])}")
    _finish(axis, lines, metric)


def _draw_layers(axis: Axes, lines: pd.DataFrame, metric: Metric, missing: str) -> None:
    alone = lines[lines["k"] == 1].sort_values("first")
    reach = [alone["value"] - alone["low"], alone["high"] - alone["value"]]
    axis.errorbar(
        alone["first"], alone["value"], reach, color=BLUE, fmt="o", markersize=4, linewidth=1.2, label="95 % interval"
    )
    _draw_levels(axis, lines)
    axis.set_xlim(-0.9, len(lines["configuration"].iloc[0]) - 0.1)
    axis.set_xlabel(f"the one layer {missing} (0 is next to the embeddings)")
    _finish(axis, lines, metric)


def _draw_removed(axis: Axes, lines: pd.DataFrame, metric: Metric, missing: str) -> None:
    """Every configuration as a point, and through the best of each number of layers a curve."""
    axis.plot(lines["k"], lines["value"], "o", color=GREY, markersize=3, zorder=1.4, label="a configuration")
    ordered = lines.dropna(subset="value").sort_values("value", ascending=not metric.higher_is_better)
    best = ordered.groupby("k").head(1).sort_values("k")
    axis.fill_between(best["k"], best["low"], best["high"], color=BLUE, alpha=0.2, linewidth=0, zorder=1.3)
    axis.plot(best["k"], best["value"], color=BLUE, marker="o", markersize=3.5, label="the best of each number")
    axis.fill_between([], [], color=GREY, alpha=0.4, linewidth=0, label="95 % interval")
    _draw_levels(axis, lines)
    axis.set_xlabel(f"how many layers {missing}, of {len(lines['configuration'].iloc[0])}")
    _finish(axis, lines, metric)


def _draw_grid(axis: Axes, lines: pd.DataFrame, metric: Metric, missing: str) -> None:
    ends = lines[lines["direction"].isin(["none", "input", "output", "both"])]
    cells = {(a, b): value for a, b, value in zip(ends["front"], ends["back"], ends["value"], strict=True)}
    num_layers = len(lines["configuration"].iloc[0])
    for value in lines.loc[lines["direction"] == "all", "value"]:
        # However many of all the layers are counted from the front, it is the same model.
        across, up = ({cell[i] for cell in cells} | {num_layers} for i in (0, 1))
        cells |= {(a, num_layers - a): value for a in across if num_layers - a in up}
    _draw_map(axis, cells, lines, metric)
    axis.set(xlabel=f"how many first layers {missing}", ylabel=f"how many last layers {missing}")


def _draw_blocks(axis: Axes, lines: pd.DataFrame, metric: Metric, missing: str) -> None:
    blocks = lines[(lines["k"] > 0) & (lines["k"] == lines["last"] - lines["first"] + 1)]
    cells = {(a, b): value for a, b, value in zip(blocks["first"], blocks["last"], blocks["value"], strict=True)}
    _draw_map(axis, cells, lines, metric)
    axis.set(xlabel=f"first layer {missing}", ylabel=f"last layer {missing}")


def _draw_map(axis: Axes, cells: dict[tuple[int, int], float], lines: pd.DataFrame, metric: Metric) -> None:
    """A square for each cell, the brighter the better; the colour bar has the levels."""
    across, up = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    values = np.full((len(up), len(across)), np.nan)
    for (a, b), value in cells.items():
        values[up.index(b), across.index(a)] = value
    norm = LogNorm if _is_wide(lines, metric) else Normalize
    shown = [*cells.values(), *(value for value, *_ in _levels(lines).values())]
    image = axis.imshow(
        values,
        origin="lower",
        cmap="viridis" if metric.higher_is_better else "viridis_r",
        norm=norm(np.nanmin(shown), np.nanmax(shown)),
        interpolation="nearest",
    )
    for ticks, names in ((axis.xaxis, across), (axis.yaxis, up)):
        every = range(0, len(names), next(step for step in _STEPS if step * 8 >= len(names)))
        ticks.set_ticks(every, [str(names[i]) for i in every])
    bar = axis.figure.colorbar(image, ax=axis, label=_label(metric), shrink=0.9)
    for label, (value, _, filling) in _levels(lines).items():
        bar.ax.plot(
            -0.35,  # widths of the bar, beside it
            value,
            transform=bar.ax.get_yaxis_transform(),
            color=BLACK,
            markerfacecolor=filling,
            marker=">",
            linestyle="none",
            label=label,
            clip_on=False,
            scalex=False,
            scaley=False,
        )
    _tick(bar.ax, lines, metric)
    strip(axis)


def _draw_levels(axis: Axes, lines: pd.DataFrame) -> None:
    for label, (value, style, _) in _levels(lines).items():
        axis.axhline(value, color=BLACK, linewidth=1, linestyle=style, zorder=1.5, label=label)


def _levels(lines: pd.DataFrame) -> dict[str, tuple[float, str, str]]:
    """What values are held against, as far as it is known: where, the style of its line, the filling of its mark."""
    whole = lines.loc[lines["direction"] == "none", "value"].dropna()
    chance = lines["chance"].dropna()
    levels = {"every layer kept": (whole, "-", BLACK), "chance": (chance, ":", "white")}
    return {label: (values.mean(), *look) for label, (values, *look) in levels.items() if len(values)}


def _finish(axis: Axes, lines: pd.DataFrame, metric: Metric) -> None:
    axis.set_ylabel(_label(metric))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if _is_wide(lines, metric):
        axis.set_yscale("log")
    _tick(axis, lines, metric)
    strip(axis)


def _tick(axis: Axes, lines: pd.DataFrame, metric: Metric) -> None:
    """Plain numbers on a logarithmic axis: 2, not 2 x 10⁰."""
    if _is_wide(lines, metric):
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())


def _is_wide(lines: pd.DataFrame, metric: Metric) -> bool:
    """Whether a logarithmic axis shows more: bits per byte of a model without its first layers are off the scale."""
    return not metric.higher_is_better and 0 < _LOG_FROM * lines["value"].min() < lines["value"].max()


def _label(metric: Metric) -> str:
    return metric.label if metric.higher_is_better else f"{metric.label}\n(less is better)"
