"""Result files, tables and pictures. The README's tables are these, written as Markdown."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, ScalarFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cogsym import plotting
from cogsym.bench.case import OURS
from cogsym.errors import CogsymError
from cogsym.records import write_whole

FORMAT = "cogsym bench 1"
HEAD_WIDTH, LABEL_WIDTH = 8, 21  # on the screen: numbers are as wide, and so is the longest word of a label


def write(result: dict[str, Any], path: Path) -> None:
    """The result file, whole or not at all."""
    try:
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise CogsymError(f"'{path}' cannot be written: {error.strerror}; choose another --out.") from None


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        CogsymError: it is not there, or is something else.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CogsymError(f"'{path}' cannot be read: {error.strerror}; name a file that cogsym bench wrote.") from None
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise CogsymError(f"'{path}' is no result file of this version ({FORMAT}); measure again with cogsym bench.")
    return result


def rows(cases: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of one part's cases."""
    part = cases[0]["part"]
    if part == "ops":
        others = list(dict.fromkeys(n for case in cases for n in case["variants"] if n != OURS))
        return [*_OPS, *(f"{name} / cogsym" for name in others)], [_ops_row(case, others) for case in cases]
    head, line = _TABLES[part]
    return head, [row for case in cases for row in line(case)]


_OPS = ["operation", "cogsym, ms", "rate", "of the floor's"]
_TRAIN = ["job", "", "ms a step", "tokens/s", "over the floor", "time / cogsym", "kept, B a token", "peak, MB"]
_LOOPS = ["", "", "seconds", "{} a second", "over the floor", "time / cogsym", "peak, MB"]
_TIMES = ["", "", "seconds", "time / cogsym"]


def _ops_row(case: dict[str, Any], others: list[str]) -> list[str]:
    unit, scale = {"B": ("GB/s", 1e9), "FLOP": ("TFLOP/s", 1e12)}[case["unit"]]
    ours = case["variants"][OURS]
    return [
        case["name"],
        f"{ours['seconds'] * 1e3:.3g}",
        f"{ours['rate'] / scale:.3g} {unit}",
        f"{1 / ours['over_floor']['median']:.0%}",
        *(spread(case["variants"].get(name, {}).get("over_cogsym")) for name in others),
    ]


def _train_rows(case: dict[str, Any]) -> list[list[str]]:
    return [
        [
            case["name"] if label == OURS else "",
            label,
            f"{v['seconds'] * 1e3:,.0f}",
            f"{case['facts']['tokens'] / v['seconds']:,.0f}",
            f"{v['over_floor']['median']:.2f}",
            spread(v.get("over_cogsym")),
            f"{v['kept_bytes_a_token']:,.0f}",
            f"{v['peak_bytes'] / 1e6:,.0f}",
        ]
        for label, v in case["variants"].items()
    ]


def _loop_rows(case: dict[str, Any]) -> list[list[str]]:
    return [
        [
            case["name"] if i == 0 else "",
            label,
            f"{v['seconds']:.3g}",
            f"{case['facts']['done'] / v['seconds']:,.0f}",
            f"{v['over_floor']['median']:.2f}",
            spread(v.get("over_cogsym")),
            f"{v['peak_bytes'] / 1e6:,.0f}",
        ]
        for i, (label, v) in enumerate(case["variants"].items())
    ]


def _times_rows(case: dict[str, Any]) -> list[list[str]]:
    lines = [
        [case["name"] if i == 0 else "", label, f"{v['seconds']:.2f}", spread(v.get("over_cogsym"))]
        for i, (label, v) in enumerate(case["variants"].items())
    ]
    facts = case["facts"]
    if "install_seconds" in facts:
        size = f"{facts['installed_bytes'] / 1e6:,.0f} MB"
        lines.append([case["name"], f"with all it needs, {size}", f"{facts['install_seconds']:.0f}", ""])
    return lines


_TABLES = {
    "train": (_TRAIN, _train_rows),
    "sweep": ([name.format("answers") for name in _LOOPS], _loop_rows),
    "generate": ([name.format("tokens") for name in _LOOPS], _loop_rows),
    "install": (_TIMES, _times_rows),
}


def spread(ratio: dict[str, float] | None) -> str:
    """A ratio with the quartiles of its rounds."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})" if ratio else ""


def notes(cases: list[dict[str, Any]]) -> list[str]:
    """What was not timed, why, and in which cases where not in all."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for label, reason in case["skipped"].items():
            found.setdefault((label, reason), []).append(case["name"].rpartition(": ")[2])
        for label, reason in case["different"].items():
            found.setdefault((label, f"it computes something else, {reason}"), []).append(case["name"])
    return [
        f"{label} not timed{'' if len(names) == len(cases) else ' in ' + '; '.join(names)}: {reason}"
        for (label, reason), names in found.items()
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result file's tables, as narrow as 80 columns: one for each case, or all operations of a model."""
    width = console.width
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault((case["part"], case["name"].rpartition(": ")[0]), []).append(case)
    for (part, title), cases in groups.items():
        if part == "ops":
            head, lines = rows(cases)
            console.print(_table(title, head, [[line[0].rpartition(": ")[2], *line[1:]] for line in lines], width))
        else:
            for case in cases:
                head, lines = rows([case])
                console.print(_table(f"{part}: {case['name']}", head[1:], [line[1:] for line in lines], width))
        for note in notes(cases):
            console.print(f"  {note}", highlight=False, markup=False)


def _table(title: str, head: list[str], lines: list[list[str]], width: int) -> Table:
    """Where it is narrow the spreads of ratios are broken between words, and never a number."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for i, name in enumerate(head):
        words = textwrap.fill(name, HEAD_WIDTH, break_long_words=False)
        table.add_column(words, justify="right" if i else "left", no_wrap=not name.endswith("/ cogsym"))
    for label, *numbers in lines:
        table.add_row(textwrap.fill(label, max(LABEL_WIDTH, width // 4)), *numbers)
    return table


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """The same for the README."""
    every = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def draw(result: dict[str, Any], path: Path) -> None:
    """The pictures of a result file, beside it."""
    draw_ratios(result, path.with_suffix(".png"))
    draw_curve(result, path.with_name(f"{path.stem}_curve.png"))


def draw_ratios(result: dict[str, Any], path: Path) -> None:
    """Each variant's time over ours, with the quartiles of its rounds: a panel for each model and precision, a row for
    each case."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        if any("over_cogsym" in variant for variant in case["variants"].values()):
            panels.setdefault(case["name"].rpartition(": ")[0], []).append(case)
    if not panels:
        return
    labels = dict.fromkeys(
        label for case in result["cases"] for label, v in case["variants"].items() if "over_cogsym" in v
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
                axis.plot([ratio["lower"], ratio["upper"]], [y, y], color=colour, linewidth=1.2)
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
    plotting.save(figure, [path])


def draw_curve(result: dict[str, Any], path: Path) -> None:
    """What more and more configurations of the grid cost, where a run has measured that."""
    parts = [case for case in result["cases"] if ": part of the grid" in case["name"]]
    if not parts:
        return
    model, kind = parts[0]["name"].partition(": ")[0], parts[0]["name"].rpartition(", ")[2]
    whole = [c for c in result["cases"] if c["name"].startswith(f"{model}: grid") and c["name"].endswith(f", {kind}")]
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
    plotting.save(figure, [path])
