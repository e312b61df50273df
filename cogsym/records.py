"""Files that are whole whenever they are there, and what two records of a run differ in."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that a kill or a power cut leaves either whole or not there.

    It is written beside `path`, with `TEMPORARY` after its name, which a kill leaves behind.

    Raises:
        OSError: it was not written; nothing is left.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def reason(error: OSError) -> str:
    """Why a file could not be written or read, in a few words."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def differences(before: Any, now: Any, name: str = "") -> str:
    """What two nested dictionaries differ in, the earlier values told; "" where nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [differences(before.get(key), now.get(key), key) for key in {**before, **now}]
        return ", ".join(part for part in parts if part)
    return "" if before == now else ("other data" if name == "data" else f"{name} {before} (now {now})")


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power cut; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
