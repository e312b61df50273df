"""OUT, the folder of a run: what lies in it, whose it is, and that one run at a time writes there.

A run writes only into a folder that was empty or that a run has made, which its settings.json says. Nothing else is
changed or removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import Timeout

from cogsym.errors import CogsymError, RunStopped
from cogsym.records import (
    MANIFEST,
    FolderLock,
    damage,
    differences,
    is_leftover,
    read_record,
    reason,
    remove_leftovers,
    replacing,
    write_manifest,
    write_record,
)
from cogsym.training import checkpoint
from cogsym.training.settings import FREE_TO_CHANGE, TrainSettings

_KEPT = 2  # checkpoints: where the last one is damaged there is one before it
_LOCK = "train.lock"
_RECORD = {"model", "plan", "settings", "products", "ranks", "data"}  # what settings.json says
_LATER = {"products", "ranks"}  # of which an earlier version wrote none


class RunFolder:
    """The folder of a run that holds its lock.

    Attributes:
        path: OUT.
        model: the trained model's folder.
        adapter: that of its adapters alone, where they were asked for.
        checkpoints: the folder of the checkpoints.
        metrics: the lines of numbers.
        picture: the curves.
        settings: what was asked of it, a file.
        record: what that holds.
    """

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        """Name its parts; `lock` is the one that the run holds."""
        self.path, self._lock = path, lock
        self.model, self.adapter, self.checkpoints = path / "model", path / "adapter", path / "checkpoints"
        self.metrics, self.picture = path / "metrics.jsonl", path / "loss.png"
        self.settings = path / "settings.json"
        self.record: dict[str, Any] = {}
        self._damaged: set[Path] = set()

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints that were written to their end and are not known to be damaged, oldest first."""
        written = [folder for folder in self._checkpoint_folders() if (folder / MANIFEST).exists()]
        return [folder for folder in written if folder not in self._damaged]

    def checkpoint_to_resume(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is as it was written.

        Args:
            say: told of those that are not, and of what is in its folder and no run wrote.

        Raises:
            CogsymError: one cannot be read.
        """
        damaged: dict[Path, str] = {}
        whole = None
        for folder in reversed(self._checkpoint_folders()):
            try:
                what = damage(folder)
            except OSError as error:
                raise CogsymError(
                    f"{folder} cannot be read ({reason(error)}); mend that and run again with --resume."
                ) from None
            if not what:
                whole = folder
                break
            damaged[folder] = what
        then = f"going on from {whole.name}" if whole else "beginning at step 0"
        for folder, what in damaged.items():
            say(f"{folder} is damaged ({what}) and not used; {then}.")
        self._damaged = {*damaged}
        for name in checkpoint.strangers(whole) if whole else ():
            say(f"{whole} holds {name}, which the run did not write: it is not read.")
        return whole

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A new folder, which becomes the checkpoint of a step once it is whole and on the disk; old ones go then.

        Raises:
            OSError: it was not written; those before are as they were.
            RunStopped: in the place of it is what no run wrote.
        """
        folder = self.checkpoints / f"checkpoint-{step}"
        if folder.exists():  # a damaged one
            checkpoint.remove(folder)
            for name in checkpoint.strangers(folder) if folder.exists() else ():
                raise RunStopped(
                    f"A checkpoint was not written: {folder / name} is in its place and not of this run; move it away "
                    "and run again with --resume."
                )
        self.checkpoints.mkdir(exist_ok=True)
        with replacing(folder, self.check_held) as new:
            new.mkdir()
            yield new
            write_record(new / checkpoint.SETTINGS, self.record)
            write_manifest(new)
        self._damaged.discard(folder)
        oldest = self.complete_checkpoints()[-_KEPT:][0]
        every = self._checkpoint_folders()
        self.check_held()
        for old in every[: every.index(oldest)]:
            with suppress(OSError):  # the next one will try again
                checkpoint.remove(old)

    def check_held(self) -> None:
        """Raise where this run may write no more.

        Raises:
            RunStopped: the folder is gone, or another run has taken its place.
        """
        if self._lock is None or self._lock.held():
            return
        if self.path.exists():
            raise RunStopped(
                f"{self.path} was replaced while the run was writing to it, so nothing more is written there; start "
                "again with another --out."
            )
        raise RunStopped(f"The folder {self.path} is gone, and the run with it; start again with another --out.")

    def check_ours(self, resume: bool) -> None:
        """Raise where a run may not start, or go on, in this folder.

        Raises:
            CogsymError: it holds what no run wrote, or a run where none is to be resumed, or none where one is.
        """
        try:
            present = sorted(self.path.iterdir()) if self.path.is_dir() else []
        except OSError as error:
            raise CogsymError(
                f"The folder {self.path} cannot be read ({reason(error)}); choose another --out."
            ) from None
        if self.settings in present:
            self.read_record()
            if not resume:
                raise CogsymError(
                    f"{self.path} holds a run already; continue it with --resume, or choose another --out."
                )
        elif resume:
            raise CogsymError(f"There is no run in {self.path} to resume; leave --resume out to start one.")
        elif others := [p for p in present if not (p.name == _LOCK or is_leftover(p, self.settings))]:
            raise CogsymError(
                f"{self.path} holds {others[0].name}, which no run of cogsym wrote; choose an empty or a new folder "
                "for --out."
            )
        ours = (self.settings, self.model, self.adapter, self.checkpoints, self.metrics, self.picture)
        for path in (self.path / _LOCK, *ours, *self._checkpoint_folders()):
            if path.is_symlink():
                raise CogsymError(
                    f"{path} is a symbolic link, expected what the run wrote there itself; put back what it leads to, "
                    "or choose another --out."
                )

    def check_same(self, record: dict[str, Any]) -> None:
        """Raise where a run may not go on, as it was asked something else than `record`; but for `FREE_TO_CHANGE`.

        Raises:
            CogsymError: that.
        """
        # An earlier version wrote no "products" and no "ranks".
        written = {name: record[name] for name in _LATER} | self.read_record()
        before, now = _fixed(written), _fixed(record)
        different = differences(before, now)
        for name in ("steps", "epochs"):
            before["settings"].pop(name, None), now["settings"].pop(name, None)
        if different and before == now:
            raise CogsymError(
                f"The run in {self.path} was started with {different}, and its learning rate ends at 0 there; resume "
                f"it with the same, and to train longer, give {self.model} as the model and another --out."
            )
        if different:
            raise CogsymError(
                f"The run in {self.path} was started with {different}; resume it with the same, or choose another "
                "--out."
            )

    def check_replaced(self, folder: Path, new: Path) -> None:
        """Raise where the folder of the model or its adapters holds what is not in the `new` one, which replaces it.

        Raises:
            RunStopped: that.
        """
        there = {path.relative_to(folder) for path in folder.rglob("*")}
        if others := sorted(there - {path.relative_to(new) for path in new.rglob("*")}):
            raise RunStopped(
                f"The trained {folder.name} was not written: {folder / others[0]} is in its place and not of this run; "
                "move it away and run again with --resume."
            )

    def read_record(self) -> dict[str, Any]:
        """What the run in this folder was asked; from a checkpoint, where settings.json is damaged.

        Raises:
            CogsymError: settings.json is not that of a run.
        """
        copies = [folder / checkpoint.SETTINGS for folder in reversed(self.complete_checkpoints())]
        for path in (self.settings, *copies):
            if (record := _record(path)) is not None:
                return record
        raise CogsymError(f"{self.settings} is not that of a run of cogsym, or is damaged; choose another --out.")

    def _checkpoint_folders(self) -> list[Path]:
        found = [p for p in self.checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def remove_unfinished(self) -> None:
        """Remove what a kill left half written."""
        for path in (self.settings, self.metrics, self.model, self.adapter, self.checkpoints / "checkpoint-*"):
            remove_leftovers(path)


def check_inputs(out: Path, model: Path | None, data: Sequence[Path]) -> None:
    """Refuse a run that would write over what it reads, or read what it writes.

    Args:
        out: OUT.
        model: the folder of the model, or None where it is not one.
        data: files and folders of text.

    Raises:
        CogsymError: one of them lies in OUT, or OUT in a folder of text.
    """
    folder = out.resolve()
    for path in [*([model] if model else []), *data]:
        if path.resolve().is_relative_to(folder):
            raise CogsymError(f"The input {path} lies in {out}, where the run writes; choose another --out.")
    for path in data:
        if folder.is_relative_to(path.resolve()):
            raise CogsymError(f"{out} lies in {path}, which the run reads; choose another --out.")


@contextmanager
def open_run_folder(out: Path, record: dict[str, Any], resume: bool) -> Iterator[RunFolder]:
    """Make a folder ready for a run, and keep other runs out of it meanwhile.

    Args:
        out: OUT, made where it is missing.
        record: what is asked of the run, which settings.json will hold: "model", "plan", "settings", "products" (the
            type that they are computed in), "ranks" (with which it began), "data".
        resume: go on with the run that is there, which was asked the same but for `FREE_TO_CHANGE`.

    Raises:
        CogsymError: as `RunFolder.check_ours`; or it cannot be written, another run writes there now, or the run there
            was asked something else.
    """
    lock = FolderLock(out / _LOCK)
    folder = RunFolder(out, lock)
    folder.check_ours(resume)
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            folder.check_ours(resume)  # again: another run may have been here meanwhile
            record = json.loads(json.dumps(record))
            if resume:
                folder.check_same(record)
            write_record(folder.settings, record, folder.check_held)
            folder.record = record
            folder.remove_unfinished()
            folder.checkpoints.mkdir(exist_ok=True)  # else Trainer makes it, and fails with a traceback
        except Timeout as error:
            raise CogsymError(f"Another run is writing to {out}; wait for it, or choose another --out.") from error
        except OSError as error:
            raise CogsymError(f"The folder {out} cannot be written ({reason(error)}); choose another --out.") from error
        yield folder
    finally:
        lock.release()


def _record(path: Path) -> dict[str, Any] | None:
    """What a settings.json holds, or None; an earlier version wrote no checksum."""
    try:
        try:
            record = read_record(path)
        except ValueError:
            record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() | _LATER == _RECORD else None


def _fixed(record: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run may not change; what a run of an earlier version did not know is as it was there."""
    settings = asdict(TrainSettings()) | record["settings"]
    products = "float32" if settings["dtype"] == "fp32" else "bfloat16"
    settings = {name: value for name, value in settings.items() if name not in FREE_TO_CHANGE}
    return {"products": products, **record, "settings": settings}
