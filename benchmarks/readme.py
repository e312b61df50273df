"""Write the tables of the README and of the page of results from the committed results: `python benchmarks/readme.py`.

Each table stands between <!-- table: NAME --> and <!-- end -->. A test compares them, so that a number in the README is
always that of a result file.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cogsym.bench import report, suite
from cogsym.bench.study import Study

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")


def study(name: str) -> Study:
    """One of `cogsym bench`, or of a script here."""
    if name in suite.STUDIES:
        return suite.STUDIES[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Study = module.STUDY
    return found


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    return report.read(RESULTS / f"{name}.json")


def chosen(name: str, words: str = "") -> str:
    """The table of the cases whose names match."""
    return report.markdown(*study(name).table([line for line in load(name)["cases"] if re.search(words, line["name"])]))


def grouped(name: str) -> list[str]:
    """All tables, each with what was not timed and why."""
    pieces = []
    for group in report.groups(load(name)["cases"]).values():
        pieces.append(report.markdown(*study(name).table(group)))
        pieces.append("\n".join(f"- {note}" for note in report.notes(group)))
    return pieces


def whole(name: str) -> str:
    """All tables, where they were measured, and the pictures."""
    result = load(name)
    machine = result["machine"]
    head = (
        f"`{result['command']}`, {machine['cores']} cores of {machine['processor'].partition(' (')[0]}, "
        f"{machine['threads']} threads, GPU: {machine['gpu']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}"
    )
    pictures = [f"![{name}]({p})" for p in (f"{name}.png", f"{name}_curve.png") if (RESULTS / p).exists()]
    return "\n\n".join(filter(None, [head, *grouped(name), *pictures]))


def allocator() -> str:
    """Training steps with freed memory kept, as the suite has it, and with the C library as it is."""
    kept, returned = load("train"), load("train_glibc")
    rows = []
    for a, b in zip(kept["cases"], returned["cases"], strict=True):
        assert a["name"] == b["name"]
        for i, label in enumerate(a["variants"]):
            over = [case["variants"][label]["over_floor"] for case in (a, b)]
            rows.append([a["name"] if i == 0 else "", label, *map(report.spread, over)])
    return report.markdown(["time over the floor", "", "memory kept", "given back"], rows)


TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(chosen, name) for name in ("swahili", "train_speed", "frozen", "longest", "streamed", "install")},
    "ops": partial(chosen, "ops", "SmolLM2.*bfloat16"),
    "train": partial(chosen, "train", "SmolLM2.*: outer"),
    "sweep": partial(chosen, "sweep", r"SmolLM2.*: (grid|input)"),
    "generate": partial(chosen, "generate", "SmolLM2"),
    "noise": lambda: "\n\n".join(filter(None, grouped("noise"))),
    **{f"whole_{part}": partial(whole, part) for part in ("ops", "train", "sweep", "generate", "install")},
    "allocator": allocator,
}


def rendered(page: str) -> str:
    """A page with its tables made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page, flags=re.S)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text("utf-8")), "utf-8")
