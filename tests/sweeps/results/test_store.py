"""Results of a sweep: nothing lost, nothing doubled, nothing mixed up, and intervals that can be believed."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import in_child

from cogsym import records
from cogsym.errors import CogsymError, RunStopped
from cogsym.records import differences, write_whole
from cogsym.sweeps.layers.configurations import Configuration, configurations
from cogsym.sweeps.results import parts as module
from cogsym.sweeps.results.bootstrap import paired_bootstrap
from cogsym.sweeps.results.store import Results, Row, frame, read_key, summary
from cogsym.sweeps.tasks.metrics import METRICS, chrf_statistics

LAYERS = 6
KEY = {
    "model": "smol",
    "revision": "1f" * 8,
    "settings": {"dtype": "float32", "length": 512},
    "tasks": {"news": {"data": "aa", "template": "{sw}"}, "choice": {"data": "bb"}},
}
WORDS = "habari ya leo mtoto anasoma kitabu shuleni mama anapika chakula kizuri sana".split()


def rows_of(task: str, document: str, chosen: list[Configuration]) -> list[Row]:
    """What a document gives under each configuration: the same in every process."""
    made = []
    for configuration in chosen:
        chance = random.Random(f"{task} {document} {configuration.code}")
        shared = (configuration, task, "sw")
        if task == "choice":
            right = float(chance.random() < 0.8 - 0.05 * configuration.k)
            made.append(Row(*shared, "perception", document, "accuracy", right, (right, 1.0, 0.5)))
            continue
        nats, size = chance.uniform(50, 90) * (1 + configuration.k), chance.randint(40, 60)
        bits = nats / size / np.log(2)
        made.append(Row(*shared, "production", document, "bits_per_byte", bits, (nats, float(size))))
        text = " ".join(chance.choices(WORDS, k=8))
        statistics = chrf_statistics(text, " ".join(WORDS[:8]))
        value = float(METRICS["chrf++"].combine(np.array(statistics)))
        made.append(Row(*shared, "production", document, "chrf++", value, statistics, text))
    return made


def sweep(
    folder: Path,
    *,
    resume: bool = False,
    number: int = 12,
    piece: int = 2,
    what: str = "input,output",
    pause: float = 0,
) -> None:
    """A sweep as `cogsym.sweep` runs one: pieces of documents, each with every configuration, skipping what is done."""
    chosen = list(dict.fromkeys(configurations(what, LAYERS)))
    with Results.open(folder, KEY, resume=resume) as results:
        for task in KEY["tasks"]:
            done = results.done(task)
            for start in range(0, number, piece):
                time.sleep(pause)
                rows = []
                for document in (f"d{d}" for d in range(start, start + piece)):
                    rows += rows_of(task, document, [c for c in chosen if (c.code, document) not in done])
                results.append(rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    sweep(folder)
    return folder


def assert_same(folder: Path, undisturbed: Path) -> None:
    got, want = frame(folder), frame(undisturbed)
    assert got.equals(want)
    assert not got.duplicated(["configuration", "task", "document", "metric"]).any()


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    chosen = configurations("grid", LAYERS)
    odd = Configuration.of(LAYERS, {"skip_mlp": [0], "revert": [3]})
    rows = rows_of("news", "d1", chosen) + rows_of("choice", "ñ/\n", [odd])
    rows.append(Row(odd, "news", "sw", "production", "d2", "bleu", float("inf"), (1.5, 2.0), "mengi\n\0é"))
    with Results.open(tmp_path, KEY) as results:
        results.append(rows[:5])
        results.append([])
        results.append(rows[5:])
    got = frame(tmp_path)
    assert len(got) == len(rows)
    for line, row in zip(got.to_dict("records"), rows, strict=True):
        configuration = row.configuration
        assert (line["model"], line["revision"]) == (KEY["model"], KEY["revision"])
        assert line["configuration"] == configuration.code
        assert (line["direction"], line["k"]) == (configuration.direction, configuration.k)
        for name in ("task", "language", "side", "document", "metric", "value"):
            assert line[name] == getattr(row, name)
        assert tuple(line["statistics"]) == row.statistics
        assert line["text"] == row.text or (row.text is None and line["text"] != line["text"])
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_done_names_what_need_not_be_asked_again(tmp_path: Path) -> None:
    chosen = configurations("single", LAYERS)
    with Results.open(tmp_path, KEY) as results:
        assert results.done("news") == set()
        results.append(rows_of("news", "d1", chosen) + rows_of("choice", "d2", chosen[:2]))
        results.append(rows_of("news", "d2", chosen[3:]))
        assert results.done("choice") == {(c.code, "d2") for c in chosen[:2]}
    with Results.open(tmp_path, KEY, resume=True) as results:
        assert results.done("news") == {(c.code, "d1") for c in chosen} | {(c.code, "d2") for c in chosen[3:]}
        assert results.done("another") == set()


def test_killed_at_20_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL, resumed, killed again; finished, the rows are those of a run that nobody disturbed."""
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    start = time.monotonic()
    assert in_child(lambda: sweep(tmp_path / "timed")) == 0
    whole = time.monotonic() - start
    finished, kills, parts = 0, 0, []
    while kills < 20:
        folder = tmp_path / str(finished)
        status = in_child(partial(sweep, folder, resume=started(folder)), chance.uniform(0, 0.7 * whole))
        if status == 0:
            assert_same(folder, undisturbed)
            finished += 1
        else:
            assert status == -signal.SIGKILL
            kills += 1
            parts.append(len(list(folder.rglob("part-*"))))
    print(f"{finished} sweeps finished; parts at each kill: {parts}")
    folder = tmp_path / str(finished)
    sweep(folder, resume=started(folder))
    assert_same(folder, undisturbed)
    assert not list(folder.rglob("*.tmp"))


def started(folder: Path) -> bool:
    return any((folder / "results").glob("part-*"))


@pytest.mark.parametrize("moment", ["half written", "written", "synced", "renamed"])
@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_killed_at_each_step_of_a_write(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    """The key is write 0, the parts follow."""
    with monkeypatch.context() as patch:
        killer = Killer(moment, number)
        patch.setattr(records, "write_whole", killer)
        patch.setattr(module, "write_whole", killer)
        assert in_child(lambda: sweep(tmp_path)) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == (moment != "renamed")
    whole = number + (moment == "renamed")
    assert len(list((tmp_path / "results").glob("*.parquet"))) == max(0, whole - 1)
    sweep(tmp_path, resume=whole > 0)
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same(tmp_path, undisturbed)


class Killer:
    """`write_whole` that dies in the given write."""

    def __init__(self, moment: str, number: int) -> None:
        self.moment, self.number = moment, number

    def __call__(self, path: Path, content: bytes, *more: Any) -> None:
        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if self.number == 0:
            if self.moment == "half written":
                path.with_name(path.name + ".0123abcd.tmp").write_bytes(content[: len(content) // 2])
                die()
            fsync, replace, patch = os.fsync, Path.replace, pytest.MonkeyPatch()
            if self.moment == "written":
                patch.setattr(os, "fsync", die)
            elif self.moment == "synced":
                patch.setattr(os, "fsync", lambda descriptor: die(fsync(descriptor)))
            else:
                patch.setattr(Path, "replace", lambda a, b: die(replace(a, b)))
        self.number -= 1
        write_whole(path, content, *more)


def test_more_configurations_and_tasks_on_resume(tmp_path: Path) -> None:
    sweep(tmp_path, what="input")
    sweep(tmp_path, resume=True, what="input,output")
    sweep(tmp_path / "once")
    order = ["task", "document", "configuration", "metric"]
    got, want = (frame(folder).sort_values(order, ignore_index=True) for folder in (tmp_path, tmp_path / "once"))
    assert got.equals(want)
    more = {**KEY, "model": "moved/smol", "tasks": {"choice": KEY["tasks"]["choice"], "third": {"data": "cc"}}}
    Results.open(tmp_path, more, resume=True).close()
    assert read_key(tmp_path) == {**KEY, "tasks": {**KEY["tasks"], "third": {"data": "cc"}}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "other", "revision": "2e"}, "holds results of another model: model smol (now other), revision "),
        ({"revision": "2e"}, f"holds results of another model: revision {KEY['revision']} (now 2e); choose another"),
        ({"settings": {"dtype": "bfloat16", "length": 512}}, "was started with dtype float32 (now bfloat16); resume"),
        ({"tokenizer": "t"}, "was started with tokenizer None (now t); resume it with the same, or choose another"),
        ({"tasks": {"news": {"data": "zz", "template": "{sw}"}}}, "was started with other data in news; resume it"),
        ({"tasks": {"choice": {"data": "bb", "shots": 1}}}, "was started with shots None (now 1) in choice; resume it"),
    ],
)
def test_results_of_another_key(undisturbed: Path, change: dict[str, Any], sentence: str) -> None:
    before = frame(undisturbed)
    with pytest.raises(CogsymError) as error:
        Results.open(undisturbed, {**KEY, **change}, resume=True)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    Results.open(undisturbed, KEY, resume=True).close()  # it is free again, and its key is as it was
    assert frame(undisturbed).equals(before) and read_key(undisturbed) == KEY


def test_a_folder_is_not_overwritten_by_mistake(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(CogsymError, match="holds results already; continue them with --resume"):
        Results.open(undisturbed, KEY)
    with pytest.raises(CogsymError, match=r"There is no sweep in .* to resume"):
        Results.open(tmp_path / "new", KEY, resume=True)
    assert not (tmp_path / "new").exists()
    Results.open(tmp_path, {**KEY, "model": "other"}).close()
    Results.open(tmp_path, KEY).close()  # it held nothing yet
    assert read_key(tmp_path) == KEY


def test_two_sweeps_at_a_time(tmp_path: Path) -> None:
    with Results.open(tmp_path, KEY) as results:
        results.append(rows_of("news", "d1", configurations("input", LAYERS)))
        (tmp_path / "results" / "part-000001.parquet.tmp").write_bytes(b"being written")
        with pytest.raises(CogsymError, match="Another sweep is writing to"):
            Results.open(tmp_path, KEY, resume=True)
        assert list(tmp_path.rglob("*.tmp"))
    Results.open(tmp_path, KEY, resume=True).close()


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(CogsymError, match=r"^The folder .* cannot be written \(.*\); choose another --out\.$"):
            Results.open(out, KEY)


def test_a_full_disk(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    chosen = configurations("input,output", LAYERS)
    with Results.open(tmp_path, KEY) as results:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunStopped, match=r"\(the disk is full\); those before are intact, free some space"):
                results.append(rows_of("news", "d0", chosen))
        assert not list((tmp_path / "results").iterdir())
    sweep(tmp_path)
    assert_same(tmp_path, undisturbed)


def test_a_limit_on_the_size_of_a_file(undisturbed: Path, tmp_path: Path) -> None:
    """The write itself fails, in the middle, as on a full disk."""
    import resource

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(RunStopped, match="Results were not written"):
            sweep(tmp_path)

    assert in_child(work) == 0
    assert not list(tmp_path.rglob("*.tmp"))
    sweep(tmp_path, resume=started(tmp_path))
    assert_same(tmp_path, undisturbed)


def test_no_results_and_damaged_ones(tmp_path: Path) -> None:
    for read in (frame, summary, read_key):
        with pytest.raises(CogsymError, match="holds no results; give the folder that a sweep wrote"):
            read(tmp_path / "nothing")
    sweep(tmp_path)
    part = sorted((tmp_path / "results").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-7])
    for read in (frame, summary):
        with pytest.raises(CogsymError, match=rf"{part} is damaged \(.*\); delete it and run the sweep again") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)
    part.unlink()
    sweep(tmp_path, resume=True)
    assert len(frame(tmp_path)) == len(frame(tmp_path).drop_duplicates(["configuration", "task", "document", "metric"]))


def test_differences() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "c 2 (now 3)"
    assert differences({"a": 1}, {"a": 1}) == ""


def test_summary_against_the_documents_themselves(undisturbed: Path) -> None:
    """Values from the rows by hand; intervals from a plain loop over the same resamples."""
    rows, got = frame(undisturbed), summary(undisturbed, resamples=40, seed=3)
    assert len(got) == len(rows.drop_duplicates(["task", "metric", "configuration"]))
    documents = sorted(set(rows.document))
    counts = np.random.default_rng(3).multinomial(len(documents), [1 / len(documents)] * len(documents), size=40)
    whole: dict[str, np.ndarray] = {}
    for line in got.sort_values("k").to_dict("records"):  # the whole model first
        mine = rows[(rows.metric == line["metric"]) & (rows.configuration == line["configuration"])]
        assert line["documents"] == len(mine) == len(documents)
        assert (line["task"], line["side"], line["direction"], line["k"], line["language"]) == tuple(
            mine.iloc[0][["task", "side", "direction", "k", "language"]]
        )
        combine = METRICS[line["metric"]].combine
        of = dict(zip(mine.document, mine.statistics, strict=True))
        drawn = [
            combine(sum(np.array(of[d]) for d, n in zip(documents, times, strict=True) for _ in range(n)))
            for times in counts
        ]
        assert line["value"] == pytest.approx(combine(np.stack(list(of.values())).sum(0)), rel=1e-12)
        assert (line["low"], line["high"]) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), rel=1e-9)
        base = whole.setdefault(line["metric"], np.array(drawn))
        low, high = np.percentile(np.array(drawn) - base, (2.5, 97.5))
        assert (line["difference_low"], line["difference_high"]) == pytest.approx((low, high), rel=1e-9, abs=1e-12)
        assert line["chance"] == 0.5 if line["metric"] == "accuracy" else np.isnan(line["chance"])
    assert summary(undisturbed, resamples=40, seed=3).equals(got)


def test_summary_does_not_depend_on_the_order_of_writing(undisturbed: Path, tmp_path: Path) -> None:
    sweep(tmp_path, piece=12)
    names = ["task", "metric", "configuration"]
    got, want = (summary(f, 50).sort_values(names, ignore_index=True) for f in (tmp_path, undisturbed))
    for name in got:
        if got[name].dtype == float:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-12, atol=1e-12)
        else:
            assert got[name].equals(want[name])


def test_interval_of_a_mean_is_that_of_theory(seed: int) -> None:
    """Of a mean the standard error is known; documents are shared, so a constant difference is certain."""
    draw = np.random.default_rng(seed)
    values = draw.normal(5, 2, size=400)
    columns = np.stack([values, values - 1, draw.normal(5, 2, size=400)], axis=1)
    statistics = np.stack([columns, np.ones_like(columns)], axis=-1)
    told = paired_bootstrap(statistics, np.ones(columns.shape, bool), 0, mean, 4000, seed)
    error = 1.96 * columns.std(axis=0) / 20
    np.testing.assert_allclose(told["low"], columns.mean(axis=0) - error, atol=0.04)
    np.testing.assert_allclose(told["high"], columns.mean(axis=0) + error, atol=0.04)
    np.testing.assert_allclose([told[n][1] for n in ("difference", "difference_low", "difference_high")], -1)
    assert told["difference_high"][2] - told["difference_low"][2] > told["high"][2] - told["low"][2]


def test_documents_that_a_configuration_lacks(seed: int) -> None:
    """A difference counts only documents that both have."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(30, 3))
    present = np.ones((30, 3), bool)
    present[:20, 1] = present[25:, 0] = False
    statistics = np.stack([values, np.ones_like(values)], axis=-1) * present[..., None]
    told = paired_bootstrap(statistics, present, 0, mean, 200, seed)
    both = present[:, 0] & present[:, 1]
    assert told["documents"].tolist() == [25, 10, 30]
    assert told["value"][1] == pytest.approx(values[20:, 1].mean())
    assert told["difference"][1] == pytest.approx((values[both, 1] - values[both, 0]).mean())
    assert told["difference"][2] == pytest.approx((values[:25, 2] - values[:25, 0]).mean())
    assert told["difference_low"][1] <= told["difference"][1] <= told["difference_high"][1]
    without = paired_bootstrap(statistics, present, None, mean, 200, seed)
    assert np.isnan(without["difference_low"]).all() and np.array_equal(without["low"], told["low"])


def mean(statistics: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return statistics[..., 0] / statistics[..., 1]


@pytest.fixture(params=range(3))
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    chosen = random.randrange(10**6)
    print("seed", chosen)
    yield chosen
