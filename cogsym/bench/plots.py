"""Pictures of a result file, beside it."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, ScalarFormatter

from cogsym import plotting
from cogsym.bench.case import OURS, Line
from cogsym.bench.report import groups


def draw_ratios(lines: list[Line], path: Path) -> None:
    """PATH.png: each variant's time over ours, with the quartiles of its rounds; a panel for each group of cases, a row
    for each case."""
    panels = groups(line for line in lines if any("over_cogsym" in result for result in line["variants"].values()))
    if not panels:
        return
    labels = dict.fromkeys(
        label for line in lines for label, result in line["variants"].items() if "over_cogsym" in result
    )
    styles = dict(zip(labels, itertools.product("osD", plotting.COLOURS), strict=False))
    rows, inch = [len(cases) for cases in panels.values()], max(0.3, 0.14 * len(labels))
    figure = Figure(figsize=(9, inch * sum(rows) + 0.7 * len(rows) + 0.3 * len(labels) / 2 + 0.4))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (title, cases) in zip(axes, panels.items(), strict=True):
        for row, case in enumerate(cases):
            present = [label for label in styles if "over_cogsym" in case["variants"].get(label, {})]
            for i, label in enumerate(present):
                ratio, (marker, colour) = case["variants"][label]["over_cogsym"], styles[label]
                y = row + (i + 0.5) / len(present) * 0.8 - 0.4
                axis.plot([ratio.get("lower"), ratio.get("upper")], [y, y], color=colour, linewidth=1.2)
                axis.plot(ratio["median"], y, marker, color=colour, markersize=4.5)
        axis.axvline(1, color=plotting.BLUE, linewidth=1)
        axis.set_yticks(range(len(cases)), [case["name"].rpartition(": ")[2] for case in cases], fontsize=8)
        axis.set(ylim=(len(cases) - 0.45, -0.55), xscale="log")
        axis.set_title(title, fontsize=9, loc="left")
        axis.xaxis.set(major_locator=LogLocator(10, (1, 1.5, 2, 3, 5)), major_formatter=ScalarFormatter())
        axis.grid(axis="x", linewidth=0.3)
        axis.minorticks_off()
        plotting.strip(axis)
    low, high = axes[-1].get_xlim()
    axes[-1].set_xlim(min(low, 0.9), max(high, 2.2))  # room for more than one number below
    axes[-1].set_xlabel("time over cogsym's, which is the line at 1; a line through a point spans half of its rounds")
    handles = [Line2D([], [], linestyle="", marker=m, color=c, label=label) for label, (m, c) in styles.items()]
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False, fontsize=8)
    top = 1 - 0.22 * -(-len(labels) // 2) / figure.get_figheight()
    figure.tight_layout(rect=(0, 0, 1, top))
    plotting.save(figure, [path.with_suffix(".png")])


def draw_curve(lines: list[Line], path: Path) -> None:
    """PATH_curve.png: what more and more configurations of the grid cost, where a run has measured that."""
    parts = [line for line in lines if ": part of the grid" in line["name"]]
    if not parts:
        return
    model, kind = parts[0]["name"].partition(": ")[0], parts[0]["name"].rpartition(", ")[2]
    whole = [c for c in lines if c["name"].startswith(f"{model}: grid") and c["name"].endswith(f", {kind}")]
    cases = [*parts, *whole]
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    xs = [case["facts"]["configurations"] for case in cases]
    styles = zip(("o-", "s--", "^:", "v:"), plotting.COLOURS, strict=False)
    everywhere = [label for label in cases[0]["variants"] if all(label in case["variants"] for case in cases)]
    for label, (line, colour) in zip(everywhere, styles, strict=False):
        left.plot(xs, [case["variants"][label]["seconds"] for case in cases], line, color=colour, label=label)
    counted = (
        ("layer_forwards", "different states", "o-"),
        ("layer_forwards_of_a_loop", "of the loop, kept layers", "s--"),
    )
    for (fact, label, line), colour in zip(counted, plotting.COLOURS, strict=False):
        right.plot(xs, [case["facts"][fact] for case in cases], line, color=colour, label=label)
    left.set(ylabel="seconds", title=f"{model}, {kind}")
    right.set(ylabel="layers computed for all tokens", title="what the trie counts")
    for axis in (left, right):
        axis.set(xlabel="configurations of the grid", xscale="log", yscale="log")
        plotting.strip(axis)
        axis.legend(frameon=False)
    figure.tight_layout()
    plotting.save(figure, [path.with_name(f"{path.stem}_curve.png")])


def draw_time_and_bytes(lines: list[Line], path: Path) -> None:
    """PATH.png: time against bytes held, of variants of which both are known; a panel for each case, the floor a
    line."""
    figure = Figure(figsize=(6.4 * len(lines), 4.4))
    for axis, line in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines, strict=True):
        known = {label: result for label, result in line["variants"].items() if "kept_bytes_a_token" in result}
        middle = max(result["kept_bytes_a_token"] for result in known.values()) / 2
        for ours, style, colour in ((True, "o-", plotting.BLUE), (False, "s", plotting.GREY)):
            points = {label: result for label, result in known.items() if label.startswith(OURS) is ours}
            xs = [result["kept_bytes_a_token"] / 1000 for result in points.values()]
            ys = [1000 * result["seconds"] for result in points.values()]
            axis.plot(xs, ys, style, color=colour, markersize=6)
            for x, y, label in zip(xs, ys, points, strict=True):
                right = 1000 * x > middle
                axis.annotate(
                    label.removeprefix(f"{OURS}, keeps "), (x, y), (-7 if right else 5, -3 if right else 4),
                    textcoords="offset points", ha="right" if right else "left", fontsize=8,
                )  # fmt: skip
        floor = 1000 * line["floor"]["seconds"]
        axis.axhline(floor, color=plotting.VERMILION, linewidth=1)
        axis.annotate(
            "the products alone", (0, floor), (2, 3), textcoords="offset points", fontsize=8, color=plotting.VERMILION
        )
        axis.set(xlabel="kB held a token", ylabel="ms", title=line["name"], ylim=(0, None))
        axis.margins(x=0.15)
        plotting.strip(axis)
    figure.tight_layout()
    plotting.save(figure, [path.with_suffix(".png")])
