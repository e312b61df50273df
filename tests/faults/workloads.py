"""What is disturbed, a training run and a sweep, and what they give undisturbed."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import cogsym
from cogsym.data import Source
from cogsym.sweeps.results.store import frame

TRAIN = cogsym.TrainSettings(
    length=64, batch_size=2, steps=6, learning_rate=1e-2, dtype="fp32", save_every=2, log_every=1
)
SWEEP = cogsym.SweepSettings(memory_budget=1)  # a document a piece: the same products whoever computes them


@dataclass
class Workload:
    """One of the two, on a model and a text.

    Attributes:
        model: a folder.
        text: a file.
        seconds: what it takes when nothing disturbs it.
        result: what it gives then.
    """

    model: Path
    text: Path
    seconds: float = 0.0
    result: Any = field(default=None, repr=False)

    def measure(self, folder: Path) -> None:
        """Run it twice: in the first what is imported late is imported."""
        for name in ("first", "second"):
            begin = time.monotonic()
            self.run(folder / name, resume=False)
            self.seconds = time.monotonic() - begin
        self.result = self.read(folder / "second")

    def run(self, out: Path, resume: bool) -> None:
        raise NotImplementedError

    def read(self, out: Path) -> Any:
        raise NotImplementedError

    def same(self, out: Path) -> bool:
        """Whether a folder holds what an undisturbed run leaves there."""
        raise NotImplementedError


class Train(Workload):
    def run(self, out: Path, resume: bool) -> None:
        cogsym.train(self.model, [Source(self.text, field="sw")], out, settings=TRAIN, resume=resume)

    def read(self, out: Path) -> Any:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        return load_file(out / "model" / "model.safetensors"), [line | {"tokens_per_second": 0} for line in lines]

    def same(self, out: Path) -> bool:
        (want, history), (got, lines) = self.result, self.read(out)
        equal = want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
        return equal and history == lines


class Sweep(Workload):
    def run(self, out: Path, resume: bool) -> None:
        task = f"text:{self.text}#sw,limit=40"
        cogsym.sweep(self.model, [{}, {"skip": 0}], [task], out, settings=SWEEP, resume=resume)

    def read(self, out: Path) -> Any:
        return frame(out).sort_values(["document", "configuration", "metric"], ignore_index=True)

    def same(self, out: Path) -> bool:
        return self.result.equals(self.read(out))


def harm(path: Path, chance: random.Random) -> str:
    """Damage a file in one of the ways in which disks and power cuts do; which one."""
    size = path.stat().st_size
    how = chance.choice(["flipped", "torn", "zeroed", "removed", "grown"]) if size else "grown"
    if how == "flipped":
        content = bytearray(path.read_bytes())
        for _ in range(chance.choice([1, 1, 1, 20])):
            content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif how == "torn":
        with path.open("rb+") as file:
            file.truncate(chance.randrange(size))
    elif how == "zeroed":
        begin = chance.randrange(size)
        with path.open("rb+") as file:
            file.seek(begin)
            file.write(bytes(size - begin))
    elif how == "removed":
        path.unlink()
    else:
        with path.open("ab") as file:
            file.write(chance.randbytes(chance.randrange(1, 5000)))
    return how
