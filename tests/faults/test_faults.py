"""Whatever happens to a run, what it goes on to is what an undisturbed one gives, or a sentence says what to do.

`pytest tests/faults --minutes 60` tries for an hour. The promise is docs/faults.md.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

if sys.platform != "linux":
    pytest.skip("the faults are made with Linux's means", allow_module_level=True)

import resource

from faults.trial import CRASHED, ENDING, Ended, Trial, obey_permissions, remove, tree
from faults.workloads import Workload, harm

KILLED = -signal.SIGKILL


def killed(trial: Trial) -> Ended:
    """SIGKILL, once or several times."""
    ended = trial.kill_somewhere()
    for _ in range(trial.chance.randrange(3)):
        process = trial.start(resume=True)
        trial.moment()
        process.send(signal.SIGKILL)
        ended = trial.ended(process, KILLED)
    return ended


def asked_to_end(trial: Trial) -> Ended:
    """SIGTERM, SIGINT or SIGHUP; before the run has begun they end the process."""
    number = trial.chance.choice(ENDING)
    trial.note(number.name)
    process = trial.start()
    trial.moment()
    process.send(number)
    ended = trial.ended(process, -number, CRASHED)
    assert ended.status != CRASHED or ended.how in ("KeyboardInterrupt", "cogsym.signals.Terminated"), ended.words
    return ended


def paused(trial: Trial) -> Ended:
    """SIGSTOP, and SIGCONT or SIGKILL after a while."""
    process = trial.start()
    trial.moment()
    process.send(signal.SIGSTOP)
    time.sleep(0.05)
    process.send(trial.chance.choice([signal.SIGCONT, signal.SIGKILL]))
    return trial.ended(process, KILLED)


def overtaken(trial: Trial) -> Ended:
    """SIGSTOP, the folder moved away, another run in its place, SIGCONT: nothing of the other is changed."""
    process = trial.start()
    trial.moment()
    process.send(signal.SIGSTOP)
    time.sleep(0.01)
    if trial.out.exists():
        trial.out.rename(trial.folder / "moved")
    assert trial.ended(trial.start()).status == 0
    before = tree(trial.out)
    process.send(signal.SIGCONT)
    ended = trial.ended(process)
    assert tree(trial.out) == before
    return ended


def two_writers(trial: Trial) -> Ended:
    """A second run in the same folder, at whatever moment: of two that write at a time one is refused."""
    first = trial.start()
    trial.moment()
    second = trial.ended(trial.start(resume=trial.chance.random() < 0.7))
    trial.ended(first)
    return second


def damaged(trial: Trial) -> Ended:
    """A file that is torn, flipped, zeroed, grown or gone, after a kill or at the end."""
    ended = trial.kill_somewhere() if trial.chance.random() < 0.7 else trial.ended(trial.start())
    for _ in range(trial.chance.choice([1, 1, 2])):
        if files := trial.files():
            path = trial.chance.choice(files)
            trial.note(f"{path} {harm(path, trial.chance)}")
    return ended


def removed(trial: Trial) -> Ended:
    """The folder, or one in it, is removed meanwhile."""
    process = trial.start()
    trial.moment()
    remove(trial.out / trial.chance.choice(["", "", "checkpoints", "results", "model"]))
    return trial.ended(process)


def full_disk(trial: Trial) -> Ended:
    """No file may grow beyond a size: a write fails in the middle, as on a full disk."""
    limit = int(2 ** trial.chance.uniform(6, 18))
    trial.note(f"{limit} bytes a file")
    return trial.ended(trial.start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))


def small_disk(trial: Trial) -> Ended:
    """A file system of its own that is too small; then there is room."""
    size = int(2 ** trial.chance.uniform(3, 11))
    trial.note(f"{size} KiB")
    trial.out.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", trial.out]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        ended = trial.ended(trial.start())
        kept = Path(shutil.copytree(trial.out, trial.folder / "kept"))
    finally:
        subprocess.run(["umount", "--lazy", trial.out], check=True)
    trial.out.rmdir()
    kept.rename(trial.out)
    return ended


def read_only(trial: Trial) -> Ended:
    """Folders that may not be written to, before or from some moment on."""
    if trial.chance.random() < 0.3:
        trial.out.mkdir()
        trial.out.chmod(0o555)
    process = trial.start(obey_permissions)
    trial.moment()
    folders = [path for path in [trial.out, *trial.out.rglob("*")] if path.is_dir()]
    for folder in folders:
        if folder.exists():
            folder.chmod(0o555)
    ended = trial.ended(process)
    for folder in folders:
        if folder.exists():
            folder.chmod(0o755)
    return ended


def little_memory(trial: Trial) -> Ended:
    """A limit on the address space; libraries may end the process."""
    room = int(2 ** trial.chance.uniform(10, 24))
    trial.note(f"{room} bytes more")

    def limit() -> None:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 14)  # M_MMAP_THRESHOLD: what is free already serves small requests alone
        libc.malloc_trim(0)
        most = psutil.Process().memory_info().vms + room
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    ended = trial.ended(trial.start(limit), CRASHED, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
    assert ended.status != CRASHED or "emory" in ended.words or "temporarily unavailable" in ended.words, ended.words
    return ended


FAULTS: dict[str, Callable[[Trial], Ended]] = {
    function.__name__.replace("_", " "): function
    for function in (
        killed, asked_to_end, paused, overtaken, two_writers, damaged, removed, full_disk, small_disk, read_only,
        little_memory,
    )
}  # fmt: skip


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("name", ["train", "sweep"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_and_nothing_different(
    workloads: dict[str, Workload], fault: str, name: str, turns: Iterator[int], told: Counter[str], tmp_path: Path
) -> None:
    for turn in turns:
        trial = Trial(workloads[name], tmp_path / str(turn))
        told["faults"] += 1
        try:
            told[FAULTS[fault](trial).how] += 1
            trial.finish()
        except pytest.skip.Exception:
            told.clear()
            raise
        except AssertionError as error:
            raise AssertionError("\n".join([str(trial.folder), *trial.events, str(error)])) from error
        told["survived"] += 1
        shutil.rmtree(trial.folder)
