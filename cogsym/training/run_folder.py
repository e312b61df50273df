"""OUT, the folder of a run: what lies in it, whose it is, and that one run at a time writes there.

A run writes only into a folder that was empty or that a run has made, which its settings.json says. Nothing else is
changed or removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from cogsym.errors import CogsymError, RunStopped
from cogsym.records import FolderLock, differences, is_leftover, reason, remove_leftovers, write_whole
from cogsym.training.settings import FREE_TO_CHANGE

COMPLETE = "complete"  # written last, so that a checkpoint cut short by a kill is not taken for a whole one
_LOCK = "train.lock"
_RECORD = {"model", "plan", "settings", "data"}  # what settings.json says


class RunFolder:
    """The folder of a run that holds its lock.

    Attributes:
        path: OUT.
        model: the trained model's folder.
        checkpoints: the folder of the checkpoints.
        metrics: the lines of numbers.
        picture: the curves.
    """

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        """Name its parts; `lock` is the one that the run holds."""
        self.path, self._lock = path, lock
        self.model, self.checkpoints = path / "model", path / "checkpoints"
        self.metrics, self.picture = path / "metrics.jsonl", path / "loss.png"
        self.settings = path / "settings.json"

    def complete_checkpoints(self) -> list[Path]:
        """The checkpoints that are whole, oldest first."""
        return [folder for folder in self._checkpoint_folders() if (folder / COMPLETE).exists()]

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
        ours = (self.path / _LOCK, self.settings, self.model, self.checkpoints, self.metrics, self.picture)
        for path in (*ours, *self._checkpoint_folders()):
            if path.is_symlink():
                raise CogsymError(
                    f"{path} is a symbolic link, expected what the run wrote there itself; put back what it leads to, "
                    "or choose another --out."
                )

    def check_model(self, new: Path) -> None:
        """Raise where the model's folder holds what is not in the `new` one, which is to take its place.

        Raises:
            RunStopped: that.
        """
        there = {path.relative_to(self.model) for path in self.model.rglob("*")}
        if others := sorted(there - {path.relative_to(new) for path in new.rglob("*")}):
            raise RunStopped(
                f"The trained model was not written: {self.model / others[0]} is in its place and not of this run; "
                "move it away and run again with --resume."
            )

    def read_record(self) -> dict[str, Any]:
        """What the run in this folder was asked.

        Raises:
            CogsymError: settings.json is not that of a run.
        """
        try:
            record = json.loads(self.settings.read_text("utf-8"))
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict) or not record.keys() >= _RECORD:
            raise CogsymError(f"{self.settings} is not that of a run of cogsym, or is damaged; choose another --out.")
        return record

    def _checkpoint_folders(self) -> list[Path]:
        found = [p for p in self.checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def remove_unfinished(self) -> None:
        """Remove what a kill left half written."""
        for path in (self.settings, self.metrics, self.model):
            remove_leftovers(path)
        whole = self.complete_checkpoints()
        for folder in self._checkpoint_folders():
            if folder not in whole:
                shutil.rmtree(folder)


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
        record: what is asked of the run, which settings.json will hold: "model", "plan", "settings", "data".
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
            if resume and (different := differences(_fixed(folder.read_record()), _fixed(record))):
                raise CogsymError(
                    f"The run in {out} was started with {different}; resume it with the same, or choose another --out."
                )
            write_whole(folder.settings, (json.dumps(record, indent=1) + "\n").encode())
            folder.remove_unfinished()
        except Timeout as error:
            raise CogsymError(f"Another run is writing to {out}; wait for it, or choose another --out.") from error
        except OSError as error:
            raise CogsymError(f"The folder {out} cannot be written ({reason(error)}); choose another --out.") from error
        yield folder
    finally:
        lock.release()


def _fixed(record: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run may not change."""
    settings = {name: value for name, value in record["settings"].items() if name not in FREE_TO_CHANGE}
    return {**record, "settings": settings}
