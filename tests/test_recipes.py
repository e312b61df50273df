"""Recipes: what `cogsym recipe` prints is read back as it was, and what is wrong in a file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from command_line import Done

from cogsym.cli import app

COMMANDS = typer.main.get_command(app).commands
TO_BE_GIVEN = {
    "train": ["--data", "news.txt", "--out", "out"],
    "sweep": ["--task", "text:dev.txt", "--out", "out"],
}


@pytest.mark.parametrize("name", TO_BE_GIVEN)
def test_a_printed_recipe_has_every_option_and_is_read_back_to_the_defaults(
    cogsym: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    text, command, file = cogsym("recipe", name).stdout, COMMANDS[name], tmp_path / "recipe.yaml"
    keys = yaml.safe_load(text).keys()
    assert {"train": {"eval", "dry_run", "all_layers"}, "sweep": {"dry_run", "stream"}}[name] < keys
    assert len(keys) == len([option for option in command.params if option.name != "help"])
    words = " ".join(text.replace("\n#", "").split())
    assert all(" ".join(option.help.split()) in words for option in command.params if option.name != "help")
    file.write_text(text.replace("model: null", "model: my-model"))
    plain = command.make_context(name, ["my-model", *TO_BE_GIVEN[name]])
    read = command.make_context(name, [str(file), *TO_BE_GIVEN[name]])
    assert read.params == plain.params and len(read.params) > 15


def test_a_recipe_trains_as_its_options_do_and_what_is_typed_wins(
    cogsym: Callable[..., Done], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    file, typed = tmp_path / "recipe.yaml", {"batch_size": 2, "length": 64, "layers": "0,3", "embeddings": True}
    typed |= {"eval": ["5%"], "dtype": "fp32"}
    given = {"model": str(model_folder), "data": f"{text_file}#sw", "out": str(tmp_path / "read"), "steps": 9} | typed
    file.write_text(yaml.safe_dump(given) + "learning_rate: 1e-3\nwarmup: 0\nlora_rank:\n")  # 1e-3 is a text in YAML
    done = cogsym("train", file, "--steps", "1", "--data", f"{text_file}#en")
    assert done.returncode == 0, done.stderr
    options = ["--batch-size", 2, "--length", 64, "--layers", "0,3", "--embeddings", "--eval", "5%", "--dtype", "fp32"]
    options += ["--learning-rate", 1e-3, "--warmup", 0, "--steps", 1]
    done = cogsym("train", model_folder, "--data", f"{text_file}#en", "--out", tmp_path / "typed", *options)
    assert done.returncode == 0, done.stderr
    read, wanted = (json.loads((tmp_path / out / "settings.json").read_text()) for out in ("read", "typed"))
    assert read == wanted and read["settings"]["steps"] == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("step: 5", "The key 'step' in {} is unknown, expected one of model, data, out, "),
        ("learning-rate: 1", "; did you mean learning_rate?"),
        ("steps: many", "steps in {} is 'many', expected a whole number."),
        ("steps: 1.5", "steps in {} is 1.5, expected a whole number."),
        ("steps: true", "steps in {} is True, expected a whole number."),
        ("warmup: little", "warmup in {} is 'little', expected a number."),
        ("stream: 1", "stream in {} is 1, expected true or false."),
        ("separator: no", "separator in {} is False, expected a text; put it in quotes."),
        ("data: [1]", "data in {} is [1], expected a text or a list of texts."),
        ("dtype: fp16", "dtype in {} is 'fp16', expected auto, bf16 or fp32."),
        ("model:", "model in {} is not given, expected a model folder or the id of a model on the hub."),
        ("steps: 0", "steps in {} is 0, expected a whole number above 0."),
        ("memory: plenty", "{}: The size of memory 'plenty' is not understood; "),
        ("[model", "{} is not yaml: "),
        ("model", "{} holds a str, expected options, such as `steps: 100`."),
    ],
)
def test_what_is_wrong_in_a_recipe(
    complaint: Callable[..., str], model_folder: Path, tmp_path: Path, line: str, told: str
) -> None:
    file = tmp_path / "recipe.yaml"
    key = line.partition(":")[0]
    given = {"model": str(model_folder), "data": "news.txt", "out": str(tmp_path / "out")}
    rest = {k: v for k, v in given.items() if k != key} if ":" in line else {}
    file.write_text("".join(f"{k}: {v}\n" for k, v in rest.items()) + line + "\n")
    assert told.format(file) in complaint("train", file)


def test_what_is_typed_behind_a_recipe_is_wrong_there(
    complaint: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {model_folder}\ndata: news.txt\nout: {tmp_path / 'out'}\nsteps: 5\n")
    assert complaint("train", file, "--steps", "0") == "cogsym: --steps is 0, expected a whole number above 0."
    assert f"{tmp_path / 'no.yaml'} cannot be read" in complaint("train", tmp_path / "no.yaml")
