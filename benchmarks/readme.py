"""Write the tables of the README and of the pages of results from the committed results: `python benchmarks/readme.py`.

Each table stands between <!-- table: NAME --> and <!-- end -->, once for each class of machines whose folder of
`benchmarks/results` has that result (`cogsym.bench.machine.machine_class`); no table mixes two. A test compares them,
so that a number in the README is always that of a result file.
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
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "cpu.md", RESULTS / "README.md")


def study(name: str) -> Study:
    """One of `cogsym bench`, or of a script here."""
    if name in suite.STUDIES:
        return suite.STUDIES[name]
    found: Study = script(name).STUDY
    return found


def script(name: str) -> Any:
    """A script here, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def each_machine(name: str, table: Callable[[str, Path], str]) -> str:
    """A table of each machine's committed result, below the machine's class."""
    paths = sorted(RESULTS.glob(f"*/{name}.json"))
    return "\n\n".join(f"{_where(path)}\n\n{table(name, path)}" for path in paths)


def _where(path: Path) -> str:
    result = report.read(path)
    machine = result["machine"]
    device = f"{machine['cores']} cores of {machine['processor'].partition(' (')[0]}"
    device = device if machine["gpu"] == "none" else machine["gpu"]
    return f"{path.parent.name}: {device}{f', {date}' if (date := result.get('date')) else ''}"


def chosen(name: str, path: Path, words: str = "") -> str:
    """The table of the cases whose names match."""
    lines = [line for line in report.read(path)["cases"] if re.search(words, line["name"])]
    return report.markdown(*study(name).table(lines))


def grouped(name: str, path: Path) -> str:
    """All tables, each with what was not timed and why."""
    pieces = []
    for group in report.groups(report.read(path)["cases"]).values():
        pieces.append(report.markdown(*study(name).table(group)))
        pieces.append("\n".join(f"- {note}" for note in report.notes(group)))
    return "\n\n".join(filter(None, pieces))


def whole(name: str, path: Path) -> str:
    """All tables, how they were measured, and the pictures."""
    result = report.read(path)
    machine = result["machine"]
    head = (
        f"`{result['command']}`, {machine['threads']} threads, GPU: {machine['gpu']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}"
    )
    drawn = [path.with_name(p) for p in (f"{name}.png", f"{name}_curve.png") if path.with_name(p).exists()]
    pictures = [f"![{name}]({p.relative_to(RESULTS)})" for p in drawn]
    return "\n\n".join([head, grouped(name, path), *pictures])


def allocator(name: str, path: Path) -> str:
    """Training steps with freed memory kept, as the suite has it, and with the C library as it is."""
    kept, returned = (report.read(path.with_name(f"{part}.json")) for part in ("train", name))
    rows = []
    for a, b in zip(kept["cases"], returned["cases"], strict=True):
        assert a["name"] == b["name"]
        for i, label in enumerate(a["variants"]):
            over = [case["variants"][label]["over_floor"] for case in (a, b)]
            rows.append([a["name"] if i == 0 else "", label, *map(report.spread, over)])
    return report.markdown(["time over the floor", "", "memory kept", "given back"], rows)


def fits(name: str, path: Path) -> str:
    """The largest models that devices adapt."""
    return report.markdown(*script(name).fits(report.read(path)["cases"]))


def gained(name: str, path: Path) -> str:
    """Of one case of each question: ours, and the fastest of the others."""
    rows = []
    for part, words in _GAINED.items():
        case = next(case for case in report.read(path.with_name(f"{part}.json"))["cases"] if words in case["name"])
        variants = {label: v for label, v in case["variants"].items() if "over_cogsym" in v and "cogsym" not in label}
        label, best = min(variants.items(), key=lambda item: item[1]["over_cogsym"]["median"])
        ours = case["variants"]["cogsym"]["seconds"]
        line = [f"{ours:.3g}", label, f"{best['seconds']:.3g}", report.spread(best["over_cogsym"])]
        rows.append([f"{part}: {case['name'].partition(': ')[2]}", *line])
    return report.markdown(["", "cogsym, seconds", "fastest other", "seconds", "time / cogsym"], rows)


def ratios(name: str, path: Path) -> str:
    """Of each case, how many times as long the others take, medians alone."""
    cases = report.read(path)["cases"]
    others = [label for label in cases[0]["variants"] if "cogsym" not in label]
    rows = []
    for case in cases:
        over = [case["variants"][label].get("over_cogsym") if label in case["variants"] else None for label in others]
        rows.append([case["name"], *("" if each is None else f"{each['median']:.2f}" for each in over)])
    return report.markdown(["", *others], rows)


_GAINED = {"train": ": outer", "sweep": ": grid", "generate": "8 prompts"}
_PARTS = ("ops", "train", "sweep", "generate", "install")
# The result and the table that each name on a page stands for.
TABLES: dict[str, tuple[str, Callable[[str, Path], str]]] = {
    **{
        name: (name, chosen)
        for name in (
            "swahili",
            "train_speed",
            "frozen",
            "parts",
            "longest",
            "streamed",
            "streamed_train",
            "install",
            "harness",
            "waiting",
        )
    },
    "ops": ("ops", partial(chosen, words="SmolLM2.*bfloat16")),
    "train": ("train", partial(chosen, words="SmolLM2.*: outer")),
    "sweep": ("sweep", partial(chosen, words=r"SmolLM2.*: (grid|input)")),
    "generate": ("generate", partial(chosen, words="SmolLM2")),
    "fits": ("longest", fits),
    "gained": ("train", gained),
    "noise": ("noise", grouped),
    "int8_products": ("int8", partial(chosen, words="^products")),
    "int8_step": ("int8", partial(chosen, words="^a step")),
    "int8_swahili": ("int8", partial(chosen, words="^Swahili")),
    "linear": ("linear", ratios),
    "stored": ("stored", grouped),
    **{f"whole_{part}": (part, whole) for part in _PARTS},
    "allocator": ("train_glibc", allocator),
}


def rendered(page: str) -> str:
    """A page with its tables made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{each_machine(*TABLES[match[1]])}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page, flags=re.S)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text("utf-8")), "utf-8")
