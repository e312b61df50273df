"""The demo's last part: which layers of the adapted model understand Tavosi, and which ones speak it."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from cogsym.demo.tasks import LONGEST, OPTIONS, HeldOut
from cogsym.sweeps.results.plots import plot
from cogsym.sweeps.runner import sweep

QUESTIONS = 40  # test meanings
SKIPPED = 2  # layers at either end, of which the last sentence speaks


def ablate(model: Path, items: HeldOut, out: Path, console: Console) -> tuple[str, list[Path]]:
    """Ablate layers of a model from the input side and from the output side, and draw what is left.

    Args:
        model: the folder of the adapted model.
        items: the demo's test items.
        out: folder for the questions, the results and the pictures.
        console: where plan and progress go.

    Returns:
        A sentence on what is left of perception and of production, and the pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    questions = [
        {"sentence": question.removesuffix(" =")} | {f"meaning{i}": option.strip() for i, option in enumerate(options)}
        for question, options in items.questions[:QUESTIONS]
    ]
    sentences = [
        {"english": source, "tavosi": reference}
        for source, reference in zip(items.sources[:QUESTIONS], items.references, strict=False)
    ]
    pairs = out / "pairs.jsonl"
    _write(out / "questions.jsonl", [question | {"label": 0} for question in questions])
    _write(pairs, sentences)
    tasks: list[dict[str, Any]] = [
        {
            "name": "meaning of Tavosi",
            "kind": "choice",
            "data": str(out / "questions.jsonl"),
            "template": "{sentence} = {option}",
            "options": [f"{{meaning{i}}}" for i in range(OPTIONS)],
        },
        _translation("perception", "{tavosi} = {english}", pairs),
        _translation("production", "{english} = {tavosi}", pairs),
    ]
    found = sweep(model, "input,output", tasks, out, console=console)
    assert found is not None  # a dry run finds nothing
    return _left(found), plot(out)


def _left(found: pd.DataFrame) -> str:
    """What is left without layers of either end."""

    def value(direction: str, metric: str, side: str) -> float:
        lines = found[(found["direction"] == direction) & (found["metric"] == metric) & (found["side"] == side)]
        return float(lines.loc[lines["k"] == (0 if direction == "none" else SKIPPED), "value"].iloc[0])

    def both(direction: str) -> str:
        return f"{value(direction, 'accuracy', 'perception'):.0%} and {value(direction, 'chrf++', 'production'):.1f}"

    return (
        f"Right meanings and chrF++ of what it writes are {both('none')} with all layers, {both('input')} without its "
        f"first {SKIPPED} layers, and {both('output')} without its last {SKIPPED}."
    )


def _translation(side: str, template: str, pairs: Path) -> dict[str, Any]:
    names = {"perception": "Tavosi to English", "production": "English to Tavosi"}
    return {
        "name": names[side],
        "kind": "translation",
        "side": side,
        "data": str(pairs),
        "template": template,
        "metrics": ["bits_per_byte", "chrf++"],
        "max_new_tokens": LONGEST,
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
