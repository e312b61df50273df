"""The table of families: which path each half takes, and how far from transformers it is.

    python tests/models/families_table.py

measures it here and writes docs/families.md anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from models import test_block
from own_models import MODELS
from sweeps.engine import test_forward
from tiny_models import EVERY, tiny_model
from training import test_frozen

import cogsym
from cogsym.training.explain import OWN

FILE = Path(__file__).parents[2] / "docs" / "families.md"
DIALS = test_frozen.KEEPS
HEADER = ("model", "attention", "MLP", "head", "why", "logits", "loss", "trained", *DIALS, "swept", "transformers")
OWN_MODELS = dict.fromkeys(family for family, _ in MODELS.values())
ABOUT = f"""# Families

Which decoder layers of transformers run on cogsym's operations, and the largest error of each in float64 against the
model's own forward: of the logits, of the loss, and of every gradient where all layers are trained and where the middle
ones are frozen and keep {", ".join(DIALS[:-1])} or {DIALS[-1]} (`cogsym.prepare(keep=...)`), relative to the largest
true value; and of a sweep's log-probabilities of a token against models of their own without the layers. Tiny random
models; plain, padded on the left, on the right, and packed batches.

A half that is not *fast* runs its module's own forward beside the other, checkpointed where it is frozen; a sweep needs
fast attention, and else runs layers whole. A head is fast where a training step makes no logits. Any other decoder of
transformers runs its own forward altogether, layer by layer: planned, trained and swept all the same. Tests hold these
against transformers, gradients bit for bit: {", ".join(OWN_MODELS)}.
In Gemma 3n and 4 a sweep skips a layer whose keys and values later ones take only together with those.

`python tests/models/families_table.py` writes this file.
"""


class Paths(NamedTuple):
    """What `explain` says of a model, but for the backends, and so the same on every machine."""

    model: str
    attention: str
    mlp: str
    head: str
    reason: str


def paths(variant: str) -> Paths:
    """Which halves are fast, in the layers between the outer ones too."""
    model = cogsym.prepare(tiny_model(variant), cogsym.LayerPlan.outer(4))
    told = cogsym.explain(model)
    halves = ([layer.attention for layer in told.layers], [layer.mlp for layer in told.layers])
    attention, mlp = ("fast" if OWN not in half else OWN if set(half) == {OWN} else "some" for half in halves)
    reasons = dict.fromkeys(filter(None, (_of_the_model(layer.reason) for layer in told.layers)))
    head = (
        "fast" if told.head.startswith("loss without logits") else told.head.replace("logits by its own forward", OWN)
    )
    return Paths(type(model).__name__.removesuffix("ForCausalLM"), attention, mlp, head, " / ".join(reasons))


def _of_the_model(reason: str) -> str:
    """The parts of a reason that are no backend's, such as "rotary on reference: ..."."""
    parts = reason.replace("; checkpointed", "").split("; ")
    return "; ".join(part for part in parts if not re.match(r"\w+ on \w+: ", part))


def variants() -> dict[Paths, list[str]]:
    """The tiny models of each row."""
    rows: dict[Paths, list[str]] = {}
    for variant in EVERY:
        rows.setdefault(paths(variant), []).append(variant)
    return dict(sorted(rows.items(), key=lambda row: (row[0].model.lower(), row[0])))


def errors(names: list[str]) -> dict[str, float]:
    """The worst of some variants by what it is of, over all kinds of batches."""
    worst = dict.fromkeys(("logits", "loss", "trained", *DIALS, "swept"), 0.0)

    def note(column: str, error: float) -> None:
        worst[column] = max(worst[column], error)

    for name in names:
        for kind in test_block.KINDS:
            for of, error in test_block.float64_errors(name, kind).items():
                note("logits" if of == "logits" else "trained", error)
            for dial, of_dial in test_frozen.float64_errors(name, kind).items():
                for of, error in of_dial.items():
                    note("loss" if of == "loss" else dial, error)
        note("swept", test_forward.float64_error(name))
    return worst


def committed() -> dict[Paths, list[float]]:
    """The file's rows: paths, and errors in the order of the header."""
    rows: dict[Paths, list[float]] = {}
    for line in FILE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] not in (HEADER[0], "---"):
            rows[Paths(*cells[:5])] = [float(cell) for cell in cells[5:-1]]
    return rows


def main() -> None:
    """Write the file."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for row, names in variants().items():
        numbers = [f"{error:.0e}" for error in errors(names).values()]
        lines.append("| " + " | ".join([*row, *numbers, transformers.__version__]) + " |")
        print(lines[-1], flush=True)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join([ABOUT, *lines, ""]), "utf-8")


if __name__ == "__main__":
    main()
