"""Files and folders that are whole whenever they are there and say where they are not any more, locked for one writer.

What two records differ in.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock

from cogsym.errors import CogsymError

TEMPORARY = ".tmp"  # the end of the name of what is not whole yet
MANIFEST = "manifest.json"
_CHECKSUM = "sha256"


def write_whole(path: Path, content: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Write a file that a kill or a power cut leaves either whole or not there.

    Args:
        path: the file.
        content: its bytes.
        check: as `replacing` takes it.

    Raises:
        OSError: it was not written; what was there is as it was.
    """
    with replacing(path, check) as new:
        new.write_bytes(content)


def write_record(path: Path, record: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
    """Write a JSON object, and the checksum that `read_record` looks at, as `write_whole` does.

    Raises:
        OSError: it was not written; what was there is as it was.
    """
    checked = {**record, _CHECKSUM: _checksum(record)}
    write_whole(path, (json.dumps(checked, indent=1, ensure_ascii=False) + "\n").encode(), check)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not that any more.
    """
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict) or record.pop(_CHECKSUM, None) != _checksum(record):
        raise ValueError(f"{path.name} is damaged")
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write down the size and the SHA-256 of every file in a folder, for `damage`; the last thing written there.

    Raises:
        OSError: it was not written.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}
    write_record(folder / MANIFEST, {"files": files})


def damage(folder: Path) -> str:
    """What in a folder is not as its manifest says, in a few words; "" where everything is.

    Raises:
        OSError: it cannot be read, which is no damage.
    """
    try:
        files = read_record(folder / MANIFEST)["files"]
    except (FileNotFoundError, NotADirectoryError):
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not what was written"
    for name, written in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != written["size"]:
            return f"{name} has {size:,} bytes, expected {written['size']:,}"
        if _digest(folder / name) != written["sha256"]:
            return f"{name} is not what was written"
    return ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A path for a new file or folder, which takes the place of `path` once it is whole and on the disk.

    It lies beside `path`, and several processes may each write theirs. Where the block raises, the new one is removed
    and `path` is as it was; a kill leaves it behind with a name that ends in `TEMPORARY`, for `remove_leftovers`.
    A folder that was there is moved aside first: a kill at that moment leaves none of the name.

    Args:
        path: a file or folder.
        check: called when the new one is about to take the place; raises where it may not any more, such as in a folder
            that was replaced while the process was paused.

    Raises:
        OSError: it was not written.
    """
    new = _beside(path)
    try:
        yield new
        for entry in (*new.rglob("*"), new):
            _sync(entry)
        check()
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
    """Remove what killed writes of `path` left behind; its name may have `*` in it."""
    for left in path.parent.glob(_leftovers(path)):
        _remove(left)


def is_leftover(left: Path, path: Path) -> bool:
    """Whether a killed write of `path` may have left this behind."""
    return fnmatchcase(left.name, _leftovers(path))


def _leftovers(path: Path) -> str:
    return f"{path.name}.{'[0-9a-f]' * 8}{TEMPORARY}"


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

    def try_out(self) -> None:
        """Raise as `acquire` does where it would, and leave the folder as it is."""
        self.acquire()
        self.release()

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


def check_file(path: Path) -> None:
    """Refuse what would be waited for, or read without an end.

    Raises:
        CogsymError: the path is a pipe, a socket or a device.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CogsymError(f"{path} is a pipe or a device, expected a file, as it is read more than once.")


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
