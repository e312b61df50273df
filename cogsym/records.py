"""Files and folders that are whole whenever they are there, and locked for one writer; what two records differ in."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

TEMPORARY = ".tmp"  # the end of the name of what is not whole yet


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that a kill or a power cut leaves either whole or not there.

    Raises:
        OSError: it was not written; what was there is as it was.
    """
    with replacing(path) as new:
        new.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for a new file or folder, which takes the place of `path` once it is whole and on the disk.

    It lies beside `path`, and several processes may each write theirs. Where the block raises, the new one is removed
    and `path` is as it was; a kill leaves it behind with a name that ends in `TEMPORARY`, for `remove_leftovers`.
    A folder that was there is moved aside first: a kill at that moment leaves none of the name.

    Raises:
        OSError: it was not written.
    """
    new = _beside(path)
    try:
        yield new
        for entry in (*new.rglob("*"), new):
            _sync(entry)
        if new.is_dir() and path.is_dir():
            old = _beside(path)
            path.replace(old)
            new.replace(path)
            shutil.rmtree(old)
        else:
            new.replace(path)
    except BaseException:
        _remove(new)
        raise
    _sync(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writes of `path` left behind."""
    for left in path.parent.iterdir():
        if is_leftover(left, path):
            _remove(left)


def is_leftover(left: Path, path: Path) -> bool:
    """Whether a killed write of `path` may have left this behind."""
    return re.fullmatch(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}", left.name) is not None


class FolderLock:
    """The right to write into a folder, which one process has at a time; a killed one loses it."""

    def __init__(self, path: Path) -> None:
        """Not locked yet.

        Args:
            path: the lock file, in the folder; it stays when the lock is released.
        """
        self._path, self._lock = path, FileLock(path)
        self._file: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Lock the folder.

        Raises:
            filelock.Timeout: another process, or another lock of this one, holds it.
            OSError: the file cannot be made.
        """
        self._lock.acquire(timeout=0)
        self._file = self._identity()

    def held(self) -> bool:
        """Whether the lock still guards the folder: not so once the folder was removed or replaced."""
        return self._lock.is_locked and self._identity() == self._file

    def release(self) -> None:
        """Let another process lock it."""
        self._lock.release()

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino


def reason(error: OSError) -> str:
    """Why a file could not be written or read, in a few words."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def differences(before: Any, now: Any, name: str = "") -> str:
    """What two nested dictionaries differ in, the earlier values first; "" where nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [differences(before.get(key), now.get(key), key) for key in {**before, **now}]
        return ", ".join(part for part in parts if part)
    return "" if before == now else ("other data" if name == "data" else f"{name} {before} (now {now})")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, last through a power cut; only POSIX opens a folder for that."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
