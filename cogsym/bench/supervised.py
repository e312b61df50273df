"""Turns in a process of their own, so that no case can take the results of others with it.

A kernel that reads where it may not spoils its process's GPU for good; one that never ends, or a compiler that
crashes, spoils the process. So the supervisor touches no GPU: it has a worker perform the turns, writes a stage's
result file anew after each, and where a worker is lost or its GPU is no longer usable it notes that and goes on with
another one. Exceptions of any kind are noted too, and so is what there was no memory or no time for.
"""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cogsym.bench import machine, method, report
from cogsym.bench.case import CaseSpec, Line, Setting, error_line, measure
from cogsym.memory import free_bytes

CONTEXT = multiprocessing.get_context("spawn")  # a fork cannot use a GPU where any import has asked for one
START_SECONDS = 120.0  # that a worker may take to import everything and find its device
STARTS = 3  # workers in a row that come to nothing before no other is tried
TABLES = "tables.md"

Reply = dict[str, Any]  # one of "line", "left_out" and "failed", and whether the worker is still "usable"


@dataclass(frozen=True)
class Turn:
    """A case, and the bytes that have to be free on the device for it."""

    spec: CaseSpec
    bytes: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Turns that share a result file.

    Attributes:
        name: of the file.
        setting: of its cases.
        turns: in their order.
        table: of some of its cases.
        until: the share of the clock at whose end no more of its turns begins.
        limit: seconds after which the process of a turn is ended.
    """

    name: str
    setting: Setting
    turns: Sequence[Turn]
    table: Callable[[list[Line]], report.Table]
    until: float = 1.0
    limit: float = 60.0


Stages = Callable[[], Sequence[Stage]]  # what makes them, anew in each worker: it has to be picklable


def run(make: Stages, out: Path, command: str, seconds: float, say: Callable[[str], None] = print) -> bool:
    """Perform all turns, as far as there is time; a result file of each stage, and their tables.

    Args:
        make: the stages, the same ones whenever it is called.
        out: the folder of the files.
        command: written into them.
        seconds: after which no turn begins and none goes on.
        say: told of each turn.

    Returns:
        Whether none failed.

    Raises:
        CogsymError: the folder cannot be written.
    """
    started, stages = time.perf_counter(), make()
    head = {"format": report.FORMAT, "command": command, "date": datetime.date.today().isoformat(), "machine": {}}
    files = [_File(stage, out, head) for stage in stages]
    workers = _Workers(make)
    try:
        for i, stage in enumerate(stages):
            for k, turn in enumerate(stage.turns):
                now = time.perf_counter() - started
                left = seconds * stage.until - now
                if left <= 0:
                    files[i].left_out[turn.spec.name] = f"its turn came after {seconds * stage.until:.0f} seconds"
                    continue
                say(f"{now:4.0f} s  {stage.name}: {turn.spec.name}")
                reply = workers.perform(i, k, left, stage.limit, started + seconds)
                head["machine"] = workers.machine
                files[i].note(turn.spec.name, reply)
                if "line" not in reply:
                    say(f"        {reply['failed']['error'] if 'failed' in reply else reply['left_out']}")
    finally:
        workers.end()
        for file in files:
            file.write()
        (out / TABLES).write_text("\n\n".join([f"`{command}`", *(file.markdown() for file in files)]) + "\n", "utf-8")
    return not any(file.failed for file in files)


def perform(stage: Stage, turn: Turn, seconds: float) -> Reply:
    """What comes of a turn, whatever that is.

    Args:
        stage: that it is of.
        turn: what is built and measured.
        seconds: after which no round begins, but for the least.
    """
    try:
        free, device = free_bytes(stage.setting.device), stage.setting.device
        if free < turn.bytes:
            return {"left_out": f"it needs {turn.bytes / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"}
        deadline = time.perf_counter() + seconds
        line = measure(turn.spec.build(), device, turn.spec.rounds, deadline, turn.spec.least_rounds)
        return {"line": {"part": stage.name, "name": turn.spec.name} | line}
    except (Exception, SystemExit) as error:
        return {"failed": {"error": error_line(error), "traceback": traceback.format_exc()}}


def _serve(make: Stages, connection: Connection) -> None:
    """A worker's life: a description of what it runs on, then an answer to each (stage, turn, seconds)."""
    stages = make()
    device = stages[0].setting.device
    connection.send(machine.describe() | _describe(device))
    method.keep_freed_memory()
    while True:
        i, k, seconds = connection.recv()
        reply = perform(stages[i], stages[i].turns[k], seconds)
        try:
            method.release(device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # says what an earlier launch did, for ever after
            reply["usable"] = True
        except Exception as error:
            afterwards = {"error": f"afterwards: {error_line(error)}", "traceback": traceback.format_exc()}
            reply = {"failed": reply.get("failed", afterwards | reply), "usable": False}
        connection.send(reply)


def _describe(device: torch.device) -> dict[str, str]:
    found = {"triton": next(iter(d.version for d in metadata.distributions(name="triton")), "none")}
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        found["gpu memory"] = f"{of.total_memory / 2**30:.0f} GiB"
        found["gpu capability"] = f"{of.major}.{of.minor}, {of.multi_processor_count} multiprocessors"
    return found


class _Workers:
    """One worker at a time, and the next where one is lost.

    Attributes:
        machine: what the last one that started said of it.
    """

    def __init__(self, make: Stages) -> None:
        self.machine: dict[str, str] = {}
        self._make, self._failed_starts = make, 0
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def perform(self, stage: int, turn: int, seconds: float, limit: float, end: float) -> Reply:
        """The reply to a turn; a worker that gives none within `limit` seconds, or by `end`, is ended."""
        if self._connection is None:
            if self._failed_starts == STARTS:
                return {"left_out": f"{STARTS} processes in a row could not be started"}
            if (failed := self._start(end)) is not None:
                self._failed_starts += 1
                return failed
            self._failed_starts = 0
        assert self._connection is not None
        self._connection.send((stage, turn, seconds))
        reply = self._receive(min(limit, end - time.perf_counter()))
        if not reply.get("usable"):
            self.end()
        return reply

    def end(self) -> None:
        """End the worker, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self, end: float) -> Reply | None:
        """What went wrong, or None."""
        self._connection, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(self._make, other), daemon=True)
        self._process.start()
        other.close()
        reply = self._receive(min(START_SECONDS, end - time.perf_counter()))
        if "failed" in reply:
            self.end()
            return reply
        self.machine = reply
        return None

    def _receive(self, limit: float) -> Reply:
        assert self._connection is not None and self._process is not None
        try:
            if self._connection.poll(max(limit, 0.0)):
                reply: Reply = self._connection.recv()
                return reply
            error = f"its process was ended after {limit:.0f} seconds without an answer"
        except (EOFError, ConnectionError):
            self._process.join()
            error = f"its process was lost, exit status {self._process.exitcode}"
        return {"failed": {"error": error, "traceback": ""}}


@dataclass
class _File:
    """A stage's result file on its way."""

    stage: Stage
    out: Path
    head: dict[str, Any]
    cases: list[Line] = field(default_factory=list)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, reply: Reply) -> None:
        """Take in what came of a turn, and write."""
        if "line" in reply:
            self.cases.append(reply["line"])
        elif "failed" in reply:
            self.failed[name] = reply["failed"]
        else:
            self.left_out[name] = reply["left_out"]
        self.write()

    def write(self) -> None:
        setting = self.stage.setting
        described = {"models": list(setting.models), "device": setting.device.type, "full": setting.full}
        result = self.head | {"setting": described, "cases": self.cases}
        self.out.mkdir(parents=True, exist_ok=True)
        report.write(result | {"failed": self.failed, "left_out": self.left_out}, self.out / f"{self.stage.name}.json")

    def markdown(self) -> str:
        """Its tables; a table that cannot be made of what was measured takes no other with it."""
        pieces = [f"## {self.stage.name}"]
        for group in report.groups(self.cases).values():
            try:
                pieces.append(report.markdown(*self.stage.table(group)))
            except Exception as error:
                pieces.append(f"- no table of {'; '.join(line['name'] for line in group)}: {error_line(error)}")
            pieces += [f"- {note}" for note in report.notes(group)]
        pieces += [f"- failed: {name}: {failure['error']}" for name, failure in self.failed.items()]
        pieces += [f"- left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n\n".join(pieces)
