"""One trial: a process that something happens to, and those that go on from what it left."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from children import own_progress
from faults.workloads import Workload

from cogsym.errors import CogsymError

SAID, CRASHED = 7, 70  # exit statuses of a child: it ended with a sentence, with a traceback
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LONGEST = 300  # seconds; a busy machine is slow


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status, negative for a signal.
        words: the sentence that it ended with, or the traceback.
    """

    status: int
    words: str = ""

    @property
    def how(self) -> str:
        """In a word or two."""
        names = {0: "finished", SAID: "said why", CRASHED: self.words.strip().rpartition("\n")[2].partition(":")[0]}
        return names.get(self.status) or f"ended by {signal.Signals(-self.status).name}"


class Process:
    """A run in a forked process, which has everything imported."""

    def __init__(self, work: Callable[[], None], words: Path) -> None:
        self._words = words
        words.touch()
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # else one ends the child as pytest, not as a run
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        else:
            status = CRASHED
            try:
                sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
                own_progress()
                note = os.open(words, os.O_WRONLY)  # before a limit forbids it
                faulthandler.dump_traceback_later(_LONGEST - 5, file=note)
                try:
                    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
                    work()
                    status = 0
                except CogsymError as error:
                    status = SAID
                    os.write(note, str(error).encode())
                except BaseException:
                    os.write(note, traceback.format_exc().encode())
            finally:
                os._exit(status)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end; one that hangs is killed, and the test fails."""
        until = time.monotonic() + _LONGEST
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it hangs: {self._words.read_text('utf-8', 'replace')}")
            time.sleep(0.002)
        return Ended(os.waitstatus_to_exitcode(ended[1]), self._words.read_text("utf-8", "replace"))


class Trial:
    """One disturbed run of a workload, in a folder of its own."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload, self.folder, self.chance = workload, folder, random.Random()
        self.out = folder / "out"
        self.events: list[str] = []
        self._number = 0
        self._bystanders: dict[Path, bytes] = {}
        folder.mkdir()
        self.put(folder / "mine" / "checkpoints" / "checkpoint-1" / "trained.safetensors")
        self.put(folder / "notes.tmp")

    def put(self, path: Path) -> None:
        """A file of the user's, which has to stay as it is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._bystanders[path] = self.chance.randbytes(50)
        path.write_bytes(self._bystanders[path])

    def start(self, before: Callable[[], None] = lambda: None, resume: bool = False) -> Process:
        """Start the run; `before` happens in its process."""
        out = self.out

        def work() -> None:
            before()
            self.workload.run(out, resume)

        self._number += 1
        return Process(work, self.folder / f"words-{self._number}")

    def moment(self) -> None:
        """Wait until somewhere in the run."""
        seconds = self.chance.uniform(0, 1.1) * self.workload.seconds
        self.note(f"after {seconds:.3f} s")
        time.sleep(seconds)

    def note(self, what: str | Ended) -> None:
        """Write down what happened, for whoever looks into a failure."""
        self.events.append(f"{what.how}: {what.words}" if isinstance(what, Ended) else what)

    def ended(self, process: Process, *allowed: int) -> Ended:
        """Wait for a process, which may have finished, said why not, or ended with one of the statuses `allowed`."""
        ended = process.wait()
        self.note(ended)
        assert ended.status in (0, SAID, *allowed), ended.words
        assert "\n" not in ended.words or ended.status == CRASHED, ended.words
        return ended

    def kill_somewhere(self) -> Ended:
        """Run and be killed, or finish before it."""
        process = self.start()
        self.moment()
        process.send(signal.SIGKILL)
        return self.ended(process, -signal.SIGKILL)

    def files(self) -> list[Path]:
        """Those in the run's folder, in an order that is the same each time."""
        return sorted(path for path in self.out.rglob("*") if path.is_file())

    def finish(self) -> None:
        """Go on, doing what the sentences say, until the run is finished; then compare it with an undisturbed one."""
        resume = any((self.out / name).exists() for name in ("settings.json", "sweep.json"))
        if resume:
            self.put(self.out / "notes.tmp")
        for attempt in range(9):
            ended = self.ended(self.start(resume=resume))
            if ended.status == 0:
                break
            if damaged := re.search(r"(/\S+) is damaged \(.*; delete it and run the sweep again", ended.words):
                Path(damaged[1]).unlink()
            elif "leave --resume out to start one" in ended.words or "continue" in ended.words:
                resume = not resume
            elif "another --out" in ended.words or "an empty or a new folder for --out" in ended.words:
                self.out, resume = self.folder / f"out-{attempt}", False
            else:
                raise AssertionError(ended.words)
        else:
            raise AssertionError("it does not come to an end")
        assert self.workload.same(self.out), "the result is another one"
        for path, content in self._bystanders.items():
            assert path.read_bytes() == content, path
        assert not [path for path in self.out.rglob("*.tmp") if path not in self._bystanders]


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def remove(folder: Path) -> None:
    """Remove a folder in which files appear meanwhile."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def obey_permissions() -> None:
    """Give up root's right to write where permissions forbid it."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, nothing) == 0
