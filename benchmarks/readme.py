"""Write the tables of the README and of the page of results from the committed results: `python benchmarks/readme.py`.

Each table stands between <!-- table: NAME --> and <!-- end -->. A test compares them, so that a number in the README is
always that of a result file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cogsym.bench import report
from cogsym.bench.report import markdown as table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")


def swahili() -> str:
    """Held-out scores before and after, by method."""
    result = load("swahili")
    methods = result["methods"]
    names = {
        "before": "before",
        "outer": "CogSym, outer 25 %",
        "all": "full fine-tuning",
        "lora": "LoRA (rank 16) on the outer 25 %",
    }
    full = methods["all"]["ntrex_swa_bits_per_byte"]
    rows = []
    for key, name in names.items():
        m = methods[key]
        gap = "" if key in ("before", "all") else f"{m['ntrex_swa_bits_per_byte'] / full - 1:+.1%}"
        x = m["xcopa_sw"]
        rows.append(
            [
                name,
                f"{m['trained_parameters'] / 1e6:.1f} M" if "trained_parameters" in m else "",
                f"{m['learning_rate']:g}" if "learning_rate" in m else "",
                f"{m['ntrex_swa_bits_per_byte']:.3f}",
                gap,
                f"{m['ntrex_eng_bits_per_byte']:.3f}",
                f"{x['accuracy']:.1%} {chance(x)}".strip(),
                f"{x['mean_margin_nats']:+.2f}",
            ]
        )
    head = [
        "", "trained", "rate", "Swahili, bits per byte", "gap to full", "English, bits per byte", "XCOPA-sw",
        "margin, nats",
    ]  # fmt: skip
    return table(head, rows)


def chance(scores: dict[str, float]) -> str:
    """Says so where an accuracy of two choices is within two standard errors of one half."""
    return "(chance)" if abs(scores["accuracy"] - 0.5) < 2 * 0.5 / scores["questions"] ** 0.5 else ""


def streamed() -> str:
    """A sweep with its layers read from disk one at a time, and with all of them in memory."""
    r = load("streamed")
    rows = [
        [name, f"{r[key]['peak_bytes'] / 1e9:.2f} GB", f"{r[key]['seconds']:.1f}", f"{r[key]['seconds_in_all']:.1f}"]
        for key, name in (("in_memory", "in memory"), ("streamed", "`--stream`"))
    ]
    return table(["layers", "memory at its peak, all in all", "seconds", "with loading and hashing"], rows)


def speed() -> str:
    """Training beside a plain loop."""
    r = load("train_speed")
    rows = [
        [name, f"{r['seconds_per_step'][key]:.2f}", f"{r['tokens_per_second'][key]:,.0f}"]
        for key, name in (("plain", "plain transformers loop, middle frozen"), ("cogsym", "`cogsym train`"))
    ]
    return table(["", "seconds a step", "tokens a second"], rows)


def frozen() -> str:
    """A frozen layer beside every alternative."""
    rows = []
    for case in load("frozen")["cases"]:
        ms, over = case["milliseconds_a_layer"], case["over_floor"]
        best = min((label for label in ms if label.startswith("cogsym")), key=ms.__getitem__)
        rows.append(
            [
                f"{case['model']}, {case['rows']} x {case['length']}, {case['dtype']}",
                f"{ms[best]:.1f} ms",
                f"{over[best]:.2f}",
                *(f"{ms[k] / ms[best]:.2f}" for k in ALTERNATIVES),
            ]
        )
    return table(["shape, rows x tokens", "cogsym", "over the floor", *(f"{k} /" for k in ALTERNATIVES)], rows)


def longest() -> str:
    """Tokens and models that fit, by method; computed from counted bytes."""
    r = load("longest")
    head = [
        "", *(f"tokens in {it['memory_gb']} GB, {it['model']}" for it in r["longest"]),
        *(f"model in {it['memory_gb']} GB, {it['tokens']:,} tokens" for it in r["largest"]),
    ]  # fmt: skip
    rows = [
        [
            method,
            *(f"{it['tokens'][method]:,}" for it in r["longest"]),
            *(it["model"][method] or "none" for it in r["largest"]),
        ]
        for method in r["longest"][0]["tokens"]
    ]
    return table(head, rows)


def chosen(part: str, words: str) -> str:
    """Of a table as `cogsym bench` prints it the cases whose names match."""
    cases = [case for case in load(part)["cases"] if re.search(words, case["name"])]
    return table(*report.rows(cases))


def whole(part: str) -> str:
    """All of a table as `cogsym bench` prints it, what was not timed and why, and the pictures."""
    result = load(part)
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault(case["name"].rpartition(": ")[0], []).append(case)
    machine = result["machine"]
    pieces = [
        f"`{result['command']}`, {machine['cores']} cores of {machine['processor'].partition(' (')[0]}, "
        f"{machine['threads']} threads, GPU: {machine['gpu']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}"
    ]
    for cases in groups.values():
        pieces.append(table(*report.rows(cases)))
        pieces += ["\n".join(f"- {note}" for note in report.notes(cases))]
    pictures = [f"{part}.png", f"{part}_curve.png"]
    pieces += [f"![{part}]({name})" for name in pictures if (RESULTS / name).exists()]
    return "\n\n".join(filter(None, pieces))


def noise() -> str:
    """Every ratio in each of the quick runs, and what `compare` says of each pair of runs."""
    r = load("noise")
    runs = list(next(iter(r["ratios"].values())))
    rows = [
        [name.replace("_", " "), *(report.spread(by_run.get(run)) for run in runs)]
        for name, by_run in r["ratios"].items()
    ]
    verdicts = [
        [pair, *(str(found["verdicts"].get(verdict, 0)) for verdict in ("noise", "regression", "improvement"))]
        for pair, found in r["comparisons"].items()
    ]
    said = table(["the first, and what was compared with it", "noise", "regression", "improvement"], verdicts)
    return table(["ratio", *runs], rows) + "\n\n" + said


def allocator() -> str:
    """Training steps with freed memory kept, as the suite has it, and with the C library as it is."""
    kept, returned = load("train"), load("train_glibc")
    rows = []
    for a, b in zip(kept["cases"], returned["cases"], strict=True):
        assert a["name"] == b["name"]
        for i, label in enumerate(a["variants"]):
            over = [case["variants"][label]["over_floor"] for case in (a, b)]
            rows.append([a["name"] if i == 0 else "", label, *map(report.spread, over)])
    return table(["time over the floor", "", "memory kept", "given back"], rows)


ALTERNATIVES = ("transformers, frozen", "checkpointing", "torch.compile", "full fine-tuning")
TABLES: dict[str, Callable[[], str]] = {
    "swahili": swahili,
    "speed": speed,
    "frozen": frozen,
    "longest": longest,
    "ops": partial(chosen, "ops", "SmolLM2.*bfloat16"),
    "train": partial(chosen, "train", "SmolLM2.*: outer"),
    "sweep": partial(chosen, "sweep", r"SmolLM2.*: (grid|input)"),
    "generate": partial(chosen, "generate", "SmolLM2"),
    "install": partial(chosen, "install", ""),
    **{f"whole_{part}": partial(whole, part) for part in ("ops", "train", "sweep", "generate", "install")},
    "streamed": streamed,
    "noise": noise,
    "allocator": allocator,
}


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def rendered(page: str) -> str:
    """A page with its tables made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page, flags=re.S)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text("utf-8")), "utf-8")
