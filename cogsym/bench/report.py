"""Result files and tables. The README's tables are these, written as Markdown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as ScreenTable

from cogsym.bench.case import OURS, Line
from cogsym.errors import CogsymError
from cogsym.records import write_whole

FORMAT = "cogsym bench 1"
HEAD_WIDTH, LABEL_WIDTH = 8, 21  # on the screen: numbers are as wide, and so is the longest word of a label

Table = tuple[list[str], list[list[str]]]  # head and rows; a second column without a name is that of variants


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


def by_variant(
    cells: Callable[[Line, dict[str, Any]], dict[str, str]],
    label: Callable[[str], str] = str,
    first: str = "",
) -> Callable[[list[Line]], Table]:
    """Tables with a row for each variant of each case.

    Args:
        cells: (case, what was measured of the variant) -> the cells of its row by their column.
        label: of a variant, in the second column.
        first: the head of the first column, which names the case.
    """

    def table(lines: list[Line]) -> Table:
        head, rows = [first, ""], []
        for line in lines:
            for i, (name, result) in enumerate(line["variants"].items()):
                found = cells(line, result)
                head = [first, "", *found]
                rows.append([line["name"] if i == 0 else "", label(name), *found.values()])
        return head, rows

    return table


def by_case(
    cells: Callable[[Line, dict[str, Any]], dict[str, str]], first: str, others: Collection[str] = ()
) -> Callable[[list[Line]], Table]:
    """Tables with a row for each case: what was measured of ours, and the others' times over it.

    Args:
        cells: (case, what was measured of ours) -> the cells by their column.
        first: the head of the first column, which names the case.
        others: the variants that get a column; all by default.
    """

    def table(lines: list[Line]) -> Table:
        labels = others or dict.fromkeys(label for line in lines for label in line["variants"] if label != OURS)
        head, rows = [first], []
        for line in lines:
            found = cells(line, line["variants"][OURS])
            head = [first, *found, *(f"{label} / cogsym" for label in labels)]
            ratios = (spread(line["variants"].get(label, {}).get("over_cogsym")) for label in labels)
            rows.append([line["name"], *found.values(), *ratios])
        return head, rows

    return table


def spread(ratio: dict[str, float] | None) -> str:
    """A ratio with the quartiles of its rounds, where they are known."""
    if not ratio:
        return ""
    return f"{ratio['median']:.2f}" + (f" ({ratio['lower']:.2f} to {ratio['upper']:.2f})" if "lower" in ratio else "")


def groups(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The cases of each table, by what their names begin with: model and precision."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["name"].rpartition(": ")[0], []).append(line)
    return found


def notes(lines: list[Line]) -> list[str]:
    """What was not timed, why, and in which cases where not in all."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        for label, reason in line["skipped"].items():
            found.setdefault((label, reason), []).append(line["name"].rpartition(": ")[2])
        for label, reason in line["different"].items():
            found.setdefault((label, f"it computes something else, {reason}"), []).append(line["name"])
    return [
        f"{label} not timed{'' if len(names) == len(lines) else ' in ' + '; '.join(names)}: {reason}"
        for (label, reason), names in found.items()
    ]


def show(lines: list[Line], table: Callable[[list[Line]], Table], console: Console) -> None:
    """Print tables as narrow as 80 columns: one for each group of cases, or for each case where its variants have rows
    of their own."""
    for title, group in groups(lines).items():
        head, rows = table(group)
        if len(head) > 1 and not head[1]:
            for line in group:
                _, rows = table([line])
                console.print(_screen_table(line["name"], head[1:], [row[1:] for row in rows], console.width))
        else:
            names = [[row[0].removeprefix(f"{title}: "), *row[1:]] for row in rows]
            console.print(_screen_table(title, head, names, console.width))
        for note in notes(group):
            console.print(f"  {note}", highlight=False, markup=False)


def _screen_table(title: str, head: list[str], rows: list[list[str]], width: int) -> ScreenTable:
    """Where it is narrow the spreads of ratios are broken between words, and never a number."""
    table = ScreenTable(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for i, name in enumerate(head):
        words = textwrap.fill(name, HEAD_WIDTH, break_long_words=False)
        table.add_column(
            words, justify="right" if i else "left", no_wrap=not name.endswith("/ cogsym"), overflow="fold"
        )
    for label, *numbers in rows:
        table.add_row(textwrap.fill(label, max(LABEL_WIDTH, width // 4)), *numbers)
    return table


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """The same for the README."""
    every = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)
