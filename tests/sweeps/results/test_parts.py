"""The files of results: no bit changes unseen, nothing else is called damage, and many small ones become few."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from children import in_child

from cogsym.errors import CogsymError, RunStopped
from cogsym.sweeps.layers.configurations import configurations
from cogsym.sweeps.results import parts as module
from cogsym.sweeps.results.parts import SCHEMA, list_parts
from cogsym.sweeps.results.store import Results, Row, frame, read_key, summary

LAYERS = 6
KEY = {"model": "smol", "revision": "1f" * 8, "tasks": {"news": {"data": "aa"}}}
CHOSEN = configurations("input", LAYERS)


def rows_of(document: int) -> list[Row]:
    chance = random.Random(document)
    return [
        Row(c, "news", "sw", "production", f"d{document}", "bits_per_byte", chance.random(), (chance.random(), 50.0))
        for c in CHOSEN
    ]


def write(folder: Path, documents: range, resume: bool = False) -> None:
    """A document a part, as under a small budget."""
    with Results.open(folder, KEY, resume=resume) as results:
        done = {document for _, document in results.done("news")}
        for document in documents:
            if f"d{document}" not in done:
                results.append(rows_of(document))


def files(folder: Path) -> list[Path]:
    return sorted((folder / "results").glob("part-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Results.open(folder, KEY) as results:
        for start in range(0, 100, 10):
            results.append([row for document in range(start, start + 10) for row in rows_of(document)])
    return frame(folder)


def test_of_600_flipped_bits_each_is_seen(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    part = files(tmp_path)[1]
    whole, chance = part.read_bytes(), random.Random(0)
    for bit in chance.sample(range(8 * len(whole)), 600):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        part.write_bytes(content)
        with pytest.raises(CogsymError, match=rf"{part} is damaged \(.*\); delete it and run the sweep again with"):
            print(bit, frame(tmp_path))
    for damaged in (whole[:-1], whole + b"\0", b"", bytes(len(whole))):
        part.write_bytes(damaged)
        with pytest.raises(CogsymError, match="is damaged"):
            summary(tmp_path)
        with pytest.raises(CogsymError, match="is damaged"):
            write(tmp_path, range(3), resume=True)
    part.unlink()
    write(tmp_path, range(3), resume=True)
    assert len(frame(tmp_path)) == 3 * len(CHOSEN)


def test_other_readers_see_it_too(tmp_path: Path) -> None:
    """Pages have checksums, for readers that look at them."""
    write(tmp_path, range(1))
    (part,) = files(tmp_path)
    content = bytearray(part.read_bytes())
    metadata = pq.ParquetFile(part).metadata
    column = metadata.row_group(0).column(SCHEMA.names.index("value"))
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match=r"(?i)crc"):
        pq.ParquetFile(part, page_checksum_verification=True).read()


LIMITED = """
import os, resource, sys
import pandas, psutil
from pathlib import Path
from cogsym.errors import CogsymError
from cogsym.sweeps.results.store import frame

for headroom in map(int, sys.argv[2:]):
    if os.fork():
        print(headroom, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    limit = psutil.Process().memory_info().vms + headroom
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        frame(Path(sys.argv[1]))
    except CogsymError as error:
        print(error, flush=True)
        os._exit(7)
    except MemoryError:
        os._exit(8)  # after reading
    os._exit(0)
"""


def test_a_memory_limit_is_not_called_damage(tmp_path: Path) -> None:
    with Results.open(tmp_path, KEY) as results:
        results.append([replace(row, text=os.urandom(2_000_000).hex()) for row in rows_of(0)])
    command = [sys.executable, "-c", LIMITED, str(tmp_path), *(str(n << 20) for n in (0, 1, 16, 24, 32, 40, 60, 400))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, statuses = [], []
    for line in done.stdout.splitlines():
        (said if line.startswith("/") else statuses).append(line)
    assert said and all("cannot be read now (" in line and "no damage" in line for line in said), done.stdout
    assert [line.split()[1] for line in statuses][:2] == ["7", "7"] and statuses[-1].endswith(" 0"), done.stdout
    assert {line.split()[1] for line in statuses} <= {"0", "7", "8"}, done.stdout


@pytest.mark.parametrize(
    "error", [OSError(11, "Resource temporarily unavailable"), OSError(24, "Too many open files"), MemoryError()]
)
def test_other_errors_are_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    write(tmp_path, range(2))

    def fails(*_: Any, **__: Any) -> None:
        raise error

    for name in ("ParquetFile.read", "ParquetFile.__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pyarrow.parquet.{name}", fails)
            for read in (frame, summary, lambda folder: write(folder, range(3), resume=True)):
                with pytest.raises(CogsymError, match=r"cannot be read now \(.+\), which is no damage") as caught:
                    read(tmp_path)
                assert "delete" not in str(caught.value)
    assert len(frame(tmp_path)) == 2 * len(CHOSEN)


def test_2000_appends_become_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it takes most of the time
    write(tmp_path, range(2000))
    assert len(files(tmp_path)) == 1 + (2000 - 1024) // 32 + 2000 % 32 == 47
    rows = frame(tmp_path)
    assert rows["document"].tolist() == [f"d{d}" for d in range(2000) for _ in CHOSEN]
    want = [row.value for d in range(2000) for row in rows_of(d)]
    assert rows["value"].tolist() == want
    before = files(tmp_path)
    write(tmp_path, range(2001), resume=True)
    assert len(set(files(tmp_path)) - set(before)) == 1 and len(frame(tmp_path)) == 2001 * len(CHOSEN)


def test_large_parts_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST", 100_000)
    write(tmp_path, range(100))
    assert len(files(tmp_path)) == 100
    monkeypatch.setattr(module, "_LARGEST", 200_000)
    write(tmp_path, range(132), resume=True)
    assert max(part.stat().st_size for part in files(tmp_path)) < 200_000 and len(files(tmp_path)) < 132


class Death:
    """Kills the process in the given call of a function, before or after it does its work."""

    def __init__(self, function: Callable[..., Any], call: int, after: bool) -> None:
        self.function, self.call, self.after = function, call, after

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.call -= 1
        if self.call == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*args, **more)
        if self.call == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "call"), [("write_whole", 33), *[("unlink", n) for n in (1, 2, 17, 32)]])
def test_killed_at_each_step_of_a_merge(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, after: bool
) -> None:
    with monkeypatch.context() as patch:
        owner = module if name == "write_whole" else Path
        death = Death(getattr(owner, name), call, after)
        patch.setattr(owner, name, death if owner is module else lambda self, **more: death(self, **more))
        assert in_child(lambda: write(tmp_path, range(100))) == -signal.SIGKILL
    assert frame(tmp_path).equals(undisturbed.iloc[: 32 * len(CHOSEN)])
    write(tmp_path, range(100), resume=True)
    assert frame(tmp_path).equals(undisturbed)
    assert len(files(tmp_path)) == len(list_parts(tmp_path / "results")) < 10


def test_killed_at_random_moments_among_merges(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOGETHER", 3)
    seed = random.randrange(10**6)
    print("seed", seed)
    chance, kills = random.Random(seed), 0
    while (status := in_child(partial(write, tmp_path, range(100), bool(kills)), chance.uniform(0.05, 0.3))) != 0:
        assert status == -signal.SIGKILL
        kills += bool(files(tmp_path))
        if kills:
            rows = frame(tmp_path)
            assert rows.equals(undisturbed.iloc[: len(rows)])
    print(kills, "kills")
    assert frame(tmp_path).equals(undisturbed)


def test_a_merge_that_fails_loses_nothing(undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole = module.write_whole

    def full(path: Path, *more: Any) -> None:
        if "-000000-000031-" in path.name:
            raise OSError(28, "No space left on device")
        write_whole(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", full)
        write(tmp_path, range(50))
    assert frame(tmp_path).equals(undisturbed.iloc[: 50 * len(CHOSEN)])
    write(tmp_path, range(100), resume=True)
    assert frame(tmp_path).equals(undisturbed)


def test_a_damaged_merged_part_does_not_cost_those_it_was_merged_from(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill had left them."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Death(Path.unlink, 1, after=False))
        assert in_child(lambda: write(tmp_path, range(100))) == -signal.SIGKILL
    assert len(files(tmp_path)) == 33
    (whole,) = (part.path for part in list_parts(tmp_path / "results"))
    content = bytearray(whole.read_bytes())
    content[1000] ^= 1
    whole.write_bytes(content)
    with pytest.raises(CogsymError, match=f"{whole} is damaged"):
        write(tmp_path, range(100), resume=True)
    whole.unlink()
    assert frame(tmp_path).equals(undisturbed.iloc[: 32 * len(CHOSEN)])
    write(tmp_path, range(100), resume=True)
    assert frame(tmp_path).equals(undisturbed)


def test_read_while_it_is_written_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOGETHER", 2)
    write(tmp_path, range(1))
    writer = threading.Thread(target=write, args=(tmp_path, range(60), True))
    writer.start()
    sizes = []
    while writer.is_alive():
        rows = frame(tmp_path)
        assert rows["document"].tolist() == [f"d{d}" for d in range(len(rows) // len(CHOSEN)) for _ in CHOSEN]
        sizes.append(len(rows))
    assert sizes == sorted(sizes)
    assert len(frame(tmp_path)) == 60 * len(CHOSEN)


def test_the_key_comes_back_from_the_parts(tmp_path: Path) -> None:
    write(tmp_path, range(40))
    record = tmp_path / "sweep.json"
    whole = record.read_bytes()
    for damaged in (whole.replace(b"smol", b"smal"), whole[:30], b"", bytes(100)):
        record.write_bytes(damaged)
        assert read_key(tmp_path) == KEY
        with pytest.raises(CogsymError, match=r"was started with other data in news"):
            Results.open(tmp_path, {**KEY, "tasks": {"news": {"data": "bb"}}}, resume=True)
        Results.open(tmp_path, KEY, resume=True).close()
        assert record.read_bytes() == whole
    record.unlink()
    Results.open(tmp_path, KEY, resume=True).close()
    assert record.read_bytes() == whole


def test_parts_of_another_version(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    (tmp_path / "results" / "part-000001.parquet").write_bytes(b"")
    for read in (
        frame,
        lambda folder: Results.open(folder, KEY, resume=True),
        lambda folder: Results.open(folder, KEY),
    ):
        with pytest.raises(CogsymError, match=r"part-000001\.parquet is not a part that this version of cogsym writes"):
            read(tmp_path)


def test_what_is_not_of_the_sweep_stays(tmp_path: Path) -> None:
    write(tmp_path, range(1))
    mine = [tmp_path / "mine.tmp", tmp_path / "results" / "mine.tmp", tmp_path / "sweep.json.old.tmp"]
    ours = [
        tmp_path / "sweep.json.0123abcd.tmp",
        tmp_path / "results" / "part-000003-000003-0123456789abcdef.parquet.0123abcd.tmp",
    ]
    for path in (*mine, *ours):
        path.write_text("half")
    write(tmp_path, range(2), resume=True)
    assert [path for path in (*mine, *ours) if path.exists()] == mine


def test_a_folder_that_is_replaced_while_a_part_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was paused in the middle of it."""
    out, write_bytes = tmp_path / "out", Path.write_bytes

    def paused(self: Path, content: Any) -> int:
        if self.is_relative_to(out) and not (tmp_path / "old").exists():
            out.rename(tmp_path / "old")
            write(tmp_path / "new", range(3))
            (tmp_path / "new").rename(out)
        return write_bytes(self, content)

    with Results.open(out, KEY) as results:
        for _ in range(2):
            results.append(rows_of(0))
        with monkeypatch.context() as patch, pytest.raises(RunStopped, match="was removed or replaced while the sweep"):
            patch.setattr(Path, "write_bytes", paused)
            results.append(rows_of(1))
    assert len(files(out)) == 3 and len(frame(out)) == 3 * len(CHOSEN)


def test_a_folder_that_is_replaced_is_not_written_to(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Results.open(out, KEY) as results:
        results.append(rows_of(0))
        out.rename(tmp_path / "old")
        for _ in range(2):
            with pytest.raises(RunStopped, match=r"out was removed or replaced while the sweep was writing to it"):
                results.append(rows_of(1))
            assert not files(out)
            if not out.exists():
                Results.open(out, KEY).close()
    assert len(files(tmp_path / "old")) == 1
