"""Configurations: what they are called, which way they go, and how a user writes them."""

from __future__ import annotations

import json
import os

import pytest

from cogsym.errors import CogsymError
from cogsym.sweeps.layers.configurations import (
    Configuration,
    blocks,
    configurations,
    distinct,
    grid,
    input_direction,
    single,
)


def code(text: str) -> Configuration:
    letters = {".": "keep", "s": "skip", "a": "skip_attention", "m": "skip_mlp", "r": "revert"}
    return Configuration(tuple(letters[letter] for letter in text))


@pytest.mark.parametrize(
    ("text", "direction", "k", "front", "back"),
    [
        ("......", "none", 0, 0, 0),
        ("ss....", "input", 2, 2, 0),
        ("....rr", "output", 2, 0, 2),
        ("s....a", "both", 2, 1, 1),
        ("mmmmmm", "all", 6, 6, 6),
        ("..s...", "single", 1, 0, 0),
        ("..ss..", "block", 2, 0, 0),
        ("s.s...", "other", 2, 1, 0),
    ],
)
def test_direction_is_read_off_the_actions(text, direction, k, front, back):
    configuration = code(text)
    assert configuration.code == text
    assert (configuration.direction, configuration.k) == (direction, k)
    assert (configuration.front, configuration.back) == (front, back)


def test_words():
    assert str(code("ss.m.s")) == "skip 0-1 and 5, skip mlp 3"
    assert str(code("...")) == "keep every layer"


def test_generators_hold_the_whole_model_and_what_they_say():
    assert {c.direction for c in input_direction(6)} == {"none", "input", "all"}
    assert [c.code for c in single(3, "skip_mlp")] == ["...", "m..", ".m.", "..m"]
    assert len(blocks(6)) == 1 + 6 * 7 // 2 == len(set(blocks(6)))
    assert {(c.front, c.back) for c in grid(4) if c.direction == "both"} == {(1, 1), (1, 2), (2, 1)}


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_file_holds_a_list(tmp_path, suffix):
    path = tmp_path / f"configs{suffix}"
    path.write_text(json.dumps([{}, {"skip": [0, "3-4"], "skip_mlp": 2}, {"revert": "1"}, "output"]), "utf-8")
    read = [c.code for c in configurations(path, 5)]
    assert read == [".....", "s.mss", ".r...", ".....", "....s", "...ss", "..sss", ".ssss", "sssss"]
    assert distinct(configurations(path, 5))[1] == 1


def test_a_list_of_layers_as_text():
    assert [c.code for c in configurations([{"skip": "0, 3-4", "skip_mlp": ["2"]}], 5)] == ["s.mss"]


def test_several_sets_and_another_action():
    chosen = configurations("input, output", 3, "skip_attention")
    assert [c.code for c in chosen] == ["...", "a..", "aa.", "aaa", "...", "..a", ".aa", "aaa"]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("sideways", "'sideways' is unknown"),
        ([{"skip": 5}], "layer 5, expected a layer from 0 to 4"),
        ([{"skip": "3-7"}], "layer 5, expected"),
        ([{"skip": -1}], "layer -1, expected"),
        ([{"skip": "last"}], "'last' is not understood at 'last'; give numbers and ranges"),
        ([{"skip": 1, "revert": 1}], "names layer 1 twice"),
        ([{"erase": 1}], "action 'erase' is unknown"),
        ([code("..")], "for 2 layers, expected 5"),
        ([], "empty"),
    ],
)
def test_what_cannot_be_is_refused(what, told):
    with pytest.raises(CogsymError, match=told) as caught:
        configurations(what, 5)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("content", "told"), [(b"{", "is not json"), (b'{"skip": 1}', "holds a dict, expected a list"), (b"\xff", "is not")]
)
def test_files_that_are_no_list_are_refused(tmp_path, content, told):
    path = tmp_path / "configs.json"
    path.write_bytes(content)
    with pytest.raises(CogsymError, match=told):
        configurations(path, 5)
    with pytest.raises(CogsymError, match="cannot be read"):
        configurations(tmp_path / "missing.yaml", 5)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(CogsymError, match=r"pipe\.yaml is a pipe or a device, expected a file"):
        configurations(tmp_path / "pipe.yaml", 5)


def test_files_stand_among_names(tmp_path):
    (tmp_path / "two.yaml").write_text("- {skip: [0, 2-3]}\n- blocks\n")
    chosen = configurations(f"single, {tmp_path / 'two.yaml'}", 4)
    assert chosen == [*single(4), code("s.ss"), *blocks(4)]
