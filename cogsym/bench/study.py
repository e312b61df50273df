"""A study: cases that answer one question, their table and their pictures; and how studies are run.

`cogsym bench` runs those of `suite`, and each script of `benchmarks/` one of its own, by `main`. A study has one result
file, with machine, versions and command, that is written case by case and can be gone on with.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cogsym.bench import machine, method, report
from cogsym.bench.case import CaseSpec, Line, Setting, join_passes, measure
from cogsym.bench.clock import Clock
from cogsym.bench.models import shape_of
from cogsym.bench.plots import draw_ratios
from cogsym.errors import CogsymError

QUICK_SECONDS = 20.0  # of a study by itself


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        name: of its result file, and of its part of `cogsym bench` or its script.
        cases: what there is to measure in a setting, in the order of their turns.
        table: of some of its cases.
        pictures: each is given all cases and the result file's path, and draws beside it.
        models: those of a full run of its script; the first is that of a quick one.
        needs: which of "model", "data" and "work" its script must be given; a study that needs no work folder has one
            for as long as it runs.
    """

    name: str
    cases: Callable[[Setting], list[CaseSpec]]
    table: Callable[[list[Line]], report.Table]
    pictures: tuple[Callable[[list[Line], Path], None], ...] = (draw_ratios,)
    models: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def run(
    work: Sequence[tuple[Study, Setting]], out: Path, command: str, *, resume: bool = False, only: str = ""
) -> list[Path]:
    """Measure, show and write; the result files.

    Args:
        work: each study with its setting.
        out: the folder of the result files and pictures.
        command: written into them.
        resume: keep what result files in that folder have of the same setting, and measure the rest.
        only: words; cases whose names do not contain them are not measured.

    Raises:
        CogsymError: a folder that cannot be written, files of another machine or setting to go on with, or no case of
            such a name.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CogsymError(f"--out is '{out}', which cannot be written: {error.strerror}; choose another.") from None
    today = datetime.date.today().isoformat()
    head = {"format": report.FORMAT, "command": command, "date": today, "machine": machine.describe()}
    jobs = [_Job(study, setting, head, out, resume) for study, setting in work]
    names = [spec.name for job in jobs for spec in job.specs]
    if not any(only in name for name in names):
        raise CogsymError(f"--case is '{only}', expected words of one of these cases: {'; '.join(names)}.")
    budgets = [setting.seconds for _, setting in work]
    turns = [spec for job in jobs for spec, _ in job.schedule(only)]
    console = Console()
    clock = Clock(turns, None if None in budgets else sum(filter(None, budgets)), console)
    for job in jobs:
        lines = job.measure(only, clock)
        for draw in job.study.pictures:
            draw(lines, job.path)
        report.show(lines, job.study.table, console)
    if left_out := [f"{job.study.name}, {name}" for job in jobs for name in job.left_out]:
        console.print(f"Left out, as there was no time for them: {'; '.join(left_out)}.", highlight=False)
    return [job.path for job in jobs]


class _Job:
    """A study on its way to a result file.

    Attributes:
        study: the study.
        path: of the result file.
        specs: its cases, in the order of their turns.
        left_out: the names of those that there was no time for.
    """

    def __init__(self, study: Study, setting: Setting, head: dict[str, Any], out: Path, resume: bool) -> None:
        self.study, self.path, self.specs = study, out / f"{study.name}.json", study.cases(setting)
        names = [shape_of(name).name for name in setting.models]
        description: dict[str, Any] = {"models": names, "device": setting.device.type, "full": setting.full}
        if not setting.full:
            description["scale"] = setting.scale
        self._setting, self._head = setting, head | {"setting": description}
        lines = self._known() if resume and self.path.exists() else []
        self._passes = {line["name"]: [line] for line in lines}
        self.left_out: list[str] = []

    def _known(self) -> list[Line]:
        """The cases of a result file that can be gone on with."""
        result = report.read(self.path)
        for field in ("machine", "setting"):
            if result[field] != self._head[field]:
                raise CogsymError(
                    f"'{self.path}' cannot be gone on with: its {field} is {result[field]}, and here "
                    f"{self._head[field]}; choose another --out, or leave --resume out to measure everything anew."
                )
        lines: list[Line] = result["cases"]
        return lines

    def schedule(self, only: str) -> list[tuple[CaseSpec, int]]:
        """The cases whose turns are to come, each with a pass that is not there yet."""
        done = {name: max(1, len(line["rounds_of_each_pass"])) for name, (line, *_) in self._passes.items()}
        chosen = [spec for spec in self.specs if only in spec.name]
        most = max((spec.passes for spec in chosen), default=0)
        return [(spec, i) for i in range(most) for spec in chosen if done.get(spec.name, 0) <= i < spec.passes]

    def measure(self, only: str, clock: Clock) -> list[Line]:
        """A line for each case, all written after each turn, so that a run that is killed loses one.

        Args:
            only: as in `run`.
            clock: says when each turn is to end, and which have to be left out.
        """
        device = self._setting.device
        method.keep_freed_memory()
        for spec, i in self.schedule(only):
            title = f"{self.study.name}{f', pass {i + 1} of {spec.passes}' if spec.passes > 1 else ''}: {spec.name}"
            passes = self._passes.setdefault(spec.name, [])
            if clock.start(title, spec):
                line = measure(spec.build(), device, spec.rounds, clock.deadline, spec.least_rounds)
                passes.append({"part": self.study.name, "name": spec.name} | line)
            elif not passes:
                self.left_out.append(spec.name)
            report.write(self._head | {"cases": self._lines(), "left_out": self.left_out}, self.path)
            method.release(device)
        return self._lines()

    def _lines(self) -> list[Line]:
        return [join_passes(self._passes[spec.name]) for spec in self.specs if self._passes.get(spec.name)]


def main(study: Study, description: str, words: Sequence[str] | None = None) -> None:
    """The command line of a script in `benchmarks/`.

    Args:
        study: what it runs.
        description: the script's docstring.
        words: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required="model" in study.needs, help="a named model or a folder")
    if "data" in study.needs:
        parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    if "work" in study.needs:
        parser.add_argument("--work", type=Path, required=True, help="folder for what the study makes on its way")
    parser.add_argument("--case", default="", help="only cases whose names contain these words")
    parser.add_argument("--quick", action="store_true", help=f"a quick look, about {QUICK_SECONDS:.0f} seconds")
    parser.add_argument("--resume", action="store_true", help="go on with the result file in --out")
    parser.add_argument("--out", type=Path, default=Path("cogsym-bench"), help="folder of result file and pictures")
    args = vars(parser.parse_args(words))
    command = f"python benchmarks/{study.name}.py" + " --quick" * args["quick"]
    command += "".join(f" --{name} {Path(args[name]).name}" for name in ("model", "data", "work") if args.get(name))
    command += f" --case {shlex.quote(args['case'])}" if args["case"] else ""
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            (args["model"],) if args["model"] else study.models[: 1 if args["quick"] else None],
            torch.device("cpu"),
            full=not args["quick"],
            seconds=QUICK_SECONDS if args["quick"] else None,
            data=args.get("data", Path()),
            work=args.get("work", Path(scratch)),
        )
        try:
            run([(study, setting)], args["out"], command, resume=args["resume"], only=args["case"])
        except CogsymError as error:
            print(f"{study.name}: {error}", file=sys.stderr)
            sys.exit(error.exit_status)
