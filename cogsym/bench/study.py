"""A study: cases that answer one question, their table and their pictures; and how studies are run.

`cogsym bench` runs those of `suite`, and each script of `benchmarks/` one of its own, by `main`. A study has one result
file, with machine, versions and command, that is written case by case and can be gone on with.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cogsym.bench import machine, method, report
from cogsym.bench.case import CaseSpec, Line, Setting, join_passes, measure
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
        only: a regular expression; cases whose names it does not match are not measured.

    Raises:
        CogsymError: a folder that cannot be written, files of another machine or setting to go on with, or no case of
            such a name.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CogsymError(f"--out is '{out}', which cannot be written: {error.strerror}; choose another.") from None
    description = machine.describe()
    jobs = []
    for study, setting in work:
        path = out / f"{study.name}.json"
        head = {
            "format": report.FORMAT,
            "command": command,
            "machine": description,
            "setting": {
                "models": [shape_of(name).name for name in setting.models],
                "device": setting.device.type,
                "full": setting.full,
            },
        }
        known = _known(path, head) if resume and path.exists() else []
        jobs.append((study, setting, study.cases(setting), head, known, path))
    if not any(re.search(only, spec.name) for _, _, specs, *_ in jobs for spec in specs):
        names = "; ".join(spec.name for _, _, specs, *_ in jobs for spec in specs)
        raise CogsymError(f"--case is '{only}', expected words of one of these cases: {names}.")
    budgets = [setting.seconds for _, setting in work]
    progress = _Progress(
        sum(len(_schedule(specs, known, only)) for _, _, specs, _, known, _ in jobs),
        None if None in budgets else sum(filter(None, budgets)),
    )
    for study, setting, specs, head, known, path in jobs:

        def write(lines: list[Line], head: dict[str, Any] = head, path: Path = path) -> None:
            report.write(head | {"cases": lines}, path)

        lines = measure_all(study.name, specs, setting, progress.start, known=known, write=write, only=only)
        for draw in study.pictures:
            draw(lines, path)
        report.show(lines, study.table, progress.console)
    return [path for *_, path in jobs]


def measure_all(
    name: str,
    specs: Sequence[CaseSpec],
    setting: Setting,
    start: Callable[[str], object],
    *,
    known: Sequence[Line] = (),
    write: Callable[[list[Line]], object] = lambda lines: None,
    only: str = "",
) -> list[Line]:
    """A line for each case.

    Args:
        name: of the study.
        specs: its cases, in the order of their turns; each has its share of the seconds that those before it left.
        setting: device and seconds.
        start: given each case's name when its turn comes.
        known: lines from before.
        write: given all lines so far after each pass, so that a run that is killed loses one case.
        only: as in `run`.
    """
    passes = {line["name"]: [line] for line in known}
    schedule = _schedule(specs, known, only)
    deadline = None if setting.seconds is None else time.perf_counter() + setting.seconds
    method.keep_freed_memory()

    def lines() -> list[Line]:
        return [join_passes(passes[spec.name]) for spec in specs if spec.name in passes]

    for done, spec in enumerate(schedule):
        start(spec.name)
        share = None
        if deadline is not None:
            now = time.perf_counter()
            share = now + (deadline - now) / (len(schedule) - done)
        line = measure(spec.build(), setting.device, spec.rounds, share, spec.least_rounds)
        passes.setdefault(spec.name, []).append({"part": name, "name": spec.name} | line)
        write(lines())
        _release(setting.device)
    return lines()


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
    parser.add_argument("--case", default="", help="only cases whose names match, a regular expression")
    parser.add_argument("--quick", action="store_true", help=f"a quick look, about {QUICK_SECONDS:.0f} seconds")
    parser.add_argument("--resume", action="store_true", help="go on with the result file in --out")
    parser.add_argument("--out", type=Path, default=Path("cogsym-bench"), help="folder of result file and pictures")
    args = vars(parser.parse_args(words))
    command = f"python benchmarks/{study.name}.py" + " --quick" * args["quick"]
    command += "".join(f" --{name} {Path(args[name]).name}" for name in ("model", "data", "work") if args.get(name))
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


def _known(path: Path, head: dict[str, Any]) -> list[Line]:
    """The cases of a result file that can be gone on with."""
    result = report.read(path)
    for field in ("machine", "setting"):
        if result[field] != head[field]:
            raise CogsymError(
                f"'{path}' cannot be gone on with: its {field} is {result[field]}, and here {head[field]}; choose "
                "another --out, or leave --resume out to measure everything anew."
            )
    lines: list[Line] = result["cases"]
    return lines


def _schedule(specs: Sequence[CaseSpec], known: Sequence[Line], only: str) -> list[CaseSpec]:
    """The cases in the order of their turns, one for each pass that is not there yet."""
    done = {line["name"]: max(1, len(line["rounds_of_each_pass"])) for line in known}
    chosen = [spec for spec in specs if re.search(only, spec.name)]
    most = max((spec.passes for spec in chosen), default=0)
    return [spec for i in range(most) for spec in chosen if done.get(spec.name, 0) <= i < spec.passes]


def _release(device: torch.device) -> None:
    """Give back what the last case held: models are large, and torch.compile holds what it made of one."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    method.release_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Progress:
    """A line for each case, with the time left: by the clock of a quick run, else by the cases done."""

    def __init__(self, total: int, budget: float | None) -> None:
        self.console = Console()
        self._total, self._done = total, 0
        self._started, self._budget = time.perf_counter(), budget

    def start(self, case: str) -> None:
        elapsed = time.perf_counter() - self._started
        left = ""
        if self._budget is not None:
            left = f", {_clock(self._budget - elapsed)} left"
        elif self._done:
            left = f", about {_clock(elapsed / self._done * (self._total - self._done))} left"
        self._done += 1
        self.console.print(f"[dim]{self._done}/{self._total}  {case}{left}[/dim]", highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes}:{rest:02d}"
