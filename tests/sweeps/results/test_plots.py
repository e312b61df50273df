"""Pictures of a sweep: which ones there are, that they show the numbers, and that nothing is cut off."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text

from cogsym import cli
from cogsym.errors import CogsymError
from cogsym.sweeps.layers.configurations import Configuration, configurations, distinct
from cogsym.sweeps.results.plots import figures, plot
from cogsym.sweeps.results.store import Results, Row, summary
from cogsym.sweeps.tasks.kinds import Side

LAYERS = 6
LONG = "a translation of parliament's proceedings, with a long name"
TASKS: dict[str, tuple[Side, str]] = {
    "choice": ("perception", "accuracy"),
    "news": ("production", "bits_per_byte"),
    LONG: ("production", "bits_per_byte"),
}


def write(folder: Path, chosen: list[Configuration], tasks: dict[str, tuple[Side, str]] = TASKS) -> None:
    chance = random.Random(0)
    rows = []
    for task, (side, metric) in tasks.items():
        for document in range(20):
            for c in chosen:
                statistics = {
                    "accuracy": (float(chance.random() < 0.9 - 0.06 * c.k), 1.0, 0.25),
                    "bits_per_byte": (chance.uniform(80, 90) * (1 + 2 * c.k), 50.0),
                    "cut": (float(chance.random() < 0.2), 1.0),
                }[metric]
                rows.append(Row(c, task, "sw", side, str(document), metric, statistics[0], statistics))
    with Results.open(folder, {"model": "m", "revision": "r", "tasks": {name: {} for name in tasks}}) as results:
        results.append(rows)


def everything() -> list[Configuration]:
    return distinct(configurations("grid,blocks,single", LAYERS) + configurations("input", LAYERS, "revert"))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    write(out, everything())
    return out


@pytest.fixture(scope="module")
def drawn(folder: Path) -> dict[str, Figure]:
    return dict(figures(summary(folder)))


def test_every_set_of_configurations_has_its_picture(tmp_path: Path) -> None:
    for what, names in {
        "input": {"directions"},
        "output": {"directions"},
        "grid": {"directions", "grid"},
        "single": {"directions", "layers"},
        "blocks": {"directions", "layers", "blocks"},
    }.items():
        out = tmp_path / what
        write(out, configurations(what, LAYERS))
        files = plot(out, tmp_path / "pictures" / what)
        assert {file.name for file in files} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
        for file in files:
            assert file.read_bytes().startswith(b"\x89PNG\r\n" if file.suffix == ".png" else b"<?xml")
            assert file.parent == tmp_path / "pictures" / what
        if what == "input":
            before = {file: file.read_bytes() for file in files}
            assert plot(out, tmp_path / "pictures" / what) == files
            assert {file: file.read_bytes() for file in files} == before


def test_directions_show_the_numbers(folder: Path, drawn: dict[str, Figure]) -> None:
    """Both ends of each curve are shared: the whole model, and no layer at all."""
    told = summary(folder)
    axes = {axis.get_title(loc="left").replace("\n", " "): axis for axis in drawn["directions"].axes if axis.has_data()}
    assert list(axes) == ["Perception: choice", f"Production: {LONG}", "Production: news"]
    left, right = (axes[f"{title}"].get_position() for title in ("Perception: choice", f"Production: {LONG}"))
    assert left.x1 < right.x0
    for name, axis in axes.items():
        lines = told[told["task"] == name.partition(": ")[2]].set_index("configuration")
        curves = {line.get_label(): line for line in axis.get_lines()}
        for label, ends in (("first k layers", "s{k}.{rest}"), ("last k layers", ".{rest}s{k}")):
            codes = [
                "s" * k + "." * (LAYERS - k) if ends.startswith("s") else "." * (LAYERS - k) + "s" * k
                for k in range(LAYERS + 1)
            ]
            np.testing.assert_array_equal(curves[label].get_xdata(), range(LAYERS + 1))
            np.testing.assert_array_equal(curves[label].get_ydata(), lines.loc[codes, "value"])
        assert set(curves["every layer kept"].get_ydata()) == {lines.loc["." * LAYERS, "value"]}
        if "choice" in name:
            assert set(curves["chance"].get_ydata()) == {0.25}
            band = axis.collections[0].get_paths()[0].vertices[:, 1]
            assert band.max() == lines.loc[["s" * k + "." * (LAYERS - k) for k in range(LAYERS + 1)], "high"].max()
            assert axis.get_yscale() == "linear"
        else:
            assert "chance" not in curves
            assert axis.get_yscale() == "log"  # thirteenfold
    reverted = drawn["directions-revert"].axes[0].get_lines()
    assert "last k layers" not in [line.get_label() for line in reverted]


@pytest.mark.parametrize("name", ["grid", "blocks"])
def test_maps_show_the_numbers(folder: Path, drawn: dict[str, Figure], name: str) -> None:
    told = summary(folder)
    lines = told[told["task"] == "news"].set_index("configuration")
    (image,) = (
        a.images[0]
        for a in drawn[name].axes
        if a.get_title(loc="left").endswith("news") and isinstance(a.images[0], AxesImage)
    )
    values = np.ma.filled(image.get_array(), np.nan)
    number = LAYERS + 1 if name == "grid" else LAYERS
    assert values.shape == (number, number)
    for up in range(number):
        for across in range(number):
            if name == "grid" and across + up <= LAYERS:
                code = "s" * across + "." * (LAYERS - across - up) + "s" * up
            elif name == "blocks" and across <= up:
                code = "." * across + "s" * (up - across + 1) + "." * (LAYERS - 1 - up)
            else:
                assert np.isnan(values[up, across])
                continue
            assert values[up, across] == lines.loc[code, "value"]
    assert image.get_cmap().name == "viridis_r"  # fewer bits are better, and brighter


def test_layers_show_the_numbers(folder: Path, drawn: dict[str, Figure]) -> None:
    lines = summary(folder).query("task == 'choice'").set_index("configuration")
    codes = ["." * i + "s" + "." * (LAYERS - 1 - i) for i in range(LAYERS)]
    (bars,) = drawn["layers"].axes[0].containers
    np.testing.assert_array_equal(bars.lines[0].get_xdata(), range(LAYERS))
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), lines.loc[codes, "value"])
    ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, lines.loc[codes, ["low", "high"]].to_numpy())


def test_a_search_has_its_curve_and_one_cell_is_no_map(tmp_path: Path) -> None:
    """As greedy leaves them: every set that was tried, of which the best of each number is joined."""
    codes = ["......", "s.....", ".s....", "..s...", ".ss...", "..ss..", ".s.s..", ".sss..", "s.ss.."]
    letters = {".": "keep", "s": "skip"}
    chosen = [Configuration(tuple(letters[letter] for letter in code)) for code in codes]
    write(tmp_path / "greedy", chosen)
    found = summary(tmp_path / "greedy")
    pictures = dict(figures(found))
    assert set(pictures) == {"directions", "layers", "blocks", "removed"}
    accuracy = found[found["metric"] == "accuracy"]
    _, curve = pictures["removed"].axes[0].lines[:2]
    assert curve.get_xdata().tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert curve.get_ydata().tolist() == accuracy.groupby("k")["value"].max().tolist()  # type: ignore[union-attr]
    write(tmp_path / "one", [chosen[0], chosen[4], Configuration(("skip", *["keep"] * 4, "skip"))])
    with pytest.raises(CogsymError, match="so there is no picture of them"):
        plot(tmp_path / "one")


def test_a_grid_of_every_other_layer(tmp_path: Path) -> None:
    chosen = [c for c in configurations("grid", LAYERS) if c.front % 2 == c.back % 2 == 0]
    write(tmp_path, chosen, {"news": TASKS["news"]})
    image = dict(figures(summary(tmp_path)))["grid"].axes[0].images[0]
    assert image.get_array().shape == (4, 4)
    assert np.ma.count(np.ma.masked_invalid(image.get_array())) == 10  # 0, 2, 4, 6: the pairs that fit in six


@pytest.mark.parametrize("tasks", [TASKS, {LONG: TASKS[LONG]}, {"t": ("production", "cut"), "choice": TASKS["choice"]}])
def test_nothing_is_cut_off_or_overlaps(tmp_path: Path, tasks: dict[str, tuple[Side, str]]) -> None:
    write(tmp_path, everything(), tasks)
    told = summary(tmp_path)
    for name, figure in figures(told):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = canvas.get_width_height()
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        boxes = {t: t.get_window_extent(canvas.get_renderer()) for t in texts}
        for text, box in boxes.items():
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            ticks = re.fullmatch(r"[-−.\d]+", text.get_text())  # matplotlib keeps ticks beyond the axis, undrawn
            assert inside or ticks, f"{name}: {text.get_text()!r} {box}"
        words = [t for t in texts if not re.fullmatch(r"[-−.\d]+", t.get_text())]
        for i, one in enumerate(words):
            for other in words[:i]:
                assert not boxes[one].overlaps(boxes[other]), f"{name}: {one.get_text()!r} and {other.get_text()!r}"


def test_metrics_by_name(tmp_path: Path) -> None:
    write(tmp_path, configurations("input", LAYERS), {"t": ("production", "cut"), **TASKS})
    told = {name for _, figure in figures(summary(tmp_path)) for name in titles(figure)}
    assert "Production: t" in told
    with pytest.raises(
        CogsymError, match=r"has no results of the metric 'bleu', expected one of accuracy, bits_per_byte, cut\.$"
    ):
        plot(tmp_path, metrics=["cut", "bleu"])
    only = tmp_path / "only"
    write(only, configurations("input", LAYERS), {"t": ("production", "cut")})
    assert len(plot(only)) == 2  # no headline metric: what there is


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left").replace("\n", " ") for axis in figure.axes]


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str | Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.argv", ["cogsym", "plot", *map(str, args)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capfd.readouterr()
        return status, out.split(), err

    status, files, _ = run(folder, "--out", tmp_path, "--metric", "accuracy")
    assert status == 0
    assert sorted(map(Path, files)) == sorted(tmp_path.iterdir())
    assert tmp_path / "directions.png" in map(Path, files)
    other = tmp_path / "other"
    write(other, [Configuration.of(LAYERS, {"skip": [1, 3]})])
    (tmp_path / "file").write_text("")
    for args, sentence in (
        ((tmp_path / "none",), "holds no results; give the folder that a sweep wrote, its --out."),
        ((other,), "are neither directions, a grid, single layers nor blocks, so there is no picture of them"),
        ((folder, "--out", tmp_path / "file"), "cannot be written ("),
        (
            (folder, "--metric", "speed"),
            "has no results of the metric 'speed', expected one of accuracy, bits_per_byte.",
        ),
    ):
        status, _, err = run(*args)
        assert status == 2
        assert len(err.splitlines()) == 1 and err.startswith("cogsym: ") and sentence in err, err
