"""Files and folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from children import in_child
from filelock import Timeout

from cogsym.records import (
    TEMPORARY,
    FolderLock,
    damage,
    differences,
    read_record,
    remove_leftovers,
    replacing,
    write_manifest,
    write_record,
    write_whole,
)


def write_folder(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "inner").mkdir()
    (folder / "inner" / "a").write_text(text)


def content(path: Path) -> str:
    return (path / "inner" / "a").read_text() if path.is_dir() else path.read_text()


def write(path: Path, text: str, folder: bool) -> None:
    write_folder(path, text) if folder else path.write_text(text)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_new_one_takes_the_place_of_the_old(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "it"
    for text in ("one", "two"):
        with replacing(path) as new:
            write(new, text, folder)
        assert content(path) == text
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, folder: bool, error: BaseException) -> None:
    path = tmp_path / "it"
    write(path, "old", folder)
    with pytest.raises(type(error)), replacing(path) as new:
        write(new, "new", folder)
        raise error
    assert content(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_killed_write_leaves_the_old_one_and_what_can_be_removed(tmp_path: Path, folder: bool) -> None:
    path, other = tmp_path / "it", tmp_path / f"it.notes{TEMPORARY}"
    write(path, "old", folder)
    other.write_text("a user's")

    def killed() -> None:
        with replacing(path) as new:
            write(new, "half", folder)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert content(path) == "old"
    assert len(list(tmp_path.glob(f"it.*{TEMPORARY}"))) == 2
    remove_leftovers(path)
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(".")[0])
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("renamed")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_whole(tmp_path / "file", b"x")
    assert events == ["file", "renamed", tmp_path.name.partition(".")[0]]
    events.clear()
    with replacing(tmp_path / "folder") as new:
        write_folder(new, "x")
    assert sorted(events[:3]) == ["a", "folder", "inner"]
    assert events[3:] == ["renamed", tmp_path.name.partition(".")[0]]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with replacing(path) as one, replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "it", b"x")
    (tmp_path / "any").touch()
    assert stat.S_IMODE((tmp_path / "it").stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def test_differences_say_what_was_and_what_is() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == ""
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 3, "b": {"c": 2, "d": 4}}) == "a 1 (now 3), d None (now 4)"
    assert differences({"data": [1]}, {"data": [2]}) == "other data"


def test_a_lock_is_held_by_one_and_lost_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lock, other = FolderLock(folder / "it.lock"), FolderLock(folder / "it.lock")
    assert not lock.held()
    lock.acquire()
    assert lock.held()
    with pytest.raises(Timeout):
        other.acquire()
    shutil.rmtree(folder)
    assert not lock.held()
    folder.mkdir()
    other.acquire()
    assert other.held() and not lock.held()
    lock.release()
    assert other.held()
    other.release()
    assert not other.held()
    lock.acquire()
    assert lock.held()
    lock.release()


RECORD = {"model": "ñ", "steps": 4, "rate": 0.1, "none": None, "list": [1, 2.5], "nested": {"a": True}}


def test_a_record_comes_back_or_is_known_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError):
            print(bit, content, read_record(path))
    for size in range(len(whole) - 1):  # the last byte ends the line
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            read_record(path)
    path.write_text('{"model": "m"}')
    with pytest.raises(ValueError, match="damaged"):
        read_record(path)


def test_a_folder_with_a_manifest_says_what_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    assert damage(folder) == "manifest.json is missing"
    folder.mkdir()
    (folder / "a").write_bytes(b"a" * 2000)
    (folder / "b").write_bytes(b"")
    write_manifest(folder)
    assert damage(folder) == ""
    (folder / "c").write_bytes(b"put there later")
    assert damage(folder) == ""
    (folder / "b").write_bytes(b"1")
    assert damage(folder) == "b has 1 bytes, expected 0"
    (folder / "a").write_bytes(b"a" * 1999 + b"b")
    assert damage(folder) == "a is not what was written"
    (folder / "a").unlink()
    assert damage(folder) == "a is missing"
    (folder / "manifest.json").write_text("{}")
    assert damage(folder) == "manifest.json is not what was written"
