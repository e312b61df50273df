"""Model folders that say what cannot be: one sentence each, at once."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import modeling_rope_utils

from cogsym.errors import CogsymError
from cogsym.models.loading import load_config, load_model, load_tokenizer
from cogsym.sweeps.engine.load import num_layers
from cogsym.sweeps.engine.weights import StreamedLayers

# What rotates must be even: transformers says so, and before 5.18 the weights that do not fit.
EVEN = "even" if "even rotary" in inspect.getsource(modeling_rope_utils) else "its weights have other shapes"


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """What hangs is ended."""

    def ended(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(read: Callable[[], Any], *words: str) -> None:
    with pytest.raises(CogsymError) as caught:
        read()
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 600, sentence
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "has num_attention_heads 0, expected a number above 0"),
        ({"num_attention_heads": -2}, "has num_attention_heads -2, expected a number above 0"),
        ({"num_attention_heads": 10**9}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "has num_key_value_heads 0, expected a number above 0"),
        ({"num_key_value_heads": 3}, ""),
        ({"num_hidden_layers": 0}, "has num_hidden_layers 0, expected a number above 0"),
        ({"num_hidden_layers": 10**7}, "has num_hidden_layers 10000000, expected at most 1000"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "has num_hidden_layers 10000000, expected at most 1000"),
        ({"hidden_size": 0}, "has hidden_size 0, expected a number above 0"),
        ({"hidden_size": 7}, "not a multiple of the number of attention heads"),
        ({"vocab_size": 0}, "has vocab_size 0, expected a number above 0"),
        ({"vocab_size": 10**12}, ""),
        ({"head_dim": 0}, "has head_dim 0, expected a number above 0"),
        ({"head_dim": 7}, EVEN),
        ({"head_dim": 8}, "its weights have other shapes than config.json gives them"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"hidden_act": "nope"}, "nope"),
        ({"hidden_act": None}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "nope"}}, "nope"),
        ({"dtype": "nope"}, "nope"),
        ({"attention_dropout": 5}, "has attention_dropout 5, expected a share from 0 to 1"),
        ({"pad_token_id": 10**6}, ""),
        ({"layer_types": ["a", "b"]}, "layer_types"),
        ({"model_type": "nope"}, "nope"),
        ({"model_type": 5}, "5"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(model_folder: Path, changes: dict[str, Any], words: str) -> None:
    file = model_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(lambda: load_model(model_folder), str(model_folder), words)
    refused(lambda: StreamedLayers(model_folder))
    if "has" in words:
        refused(lambda: load_config(model_folder), words)
        refused(lambda: num_layers(model_folder), words)


def test_a_folder_that_is_mistyped_is_not_looked_for_on_the_hub(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent.parent)
    name = f"{model_folder.parent.name}/modle"
    for read in (load_model, load_config, load_tokenizer):
        refused(lambda read=read: read(name), f"There is no model folder '{name}'")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b"{}" + bytes(10)])
def test_configurations_that_are_none(model_folder: Path, content: bytes) -> None:
    (model_folder / "config.json").write_bytes(content)
    refused(lambda: load_model(model_folder), str(model_folder))
    refused(lambda: num_layers(model_folder), str(model_folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff"])
def test_tokenizers_that_are_none(model_folder: Path, name: str, content: bytes) -> None:
    (model_folder / name).write_bytes(content)
    refused(lambda: load_tokenizer(model_folder), f"The tokenizer of '{model_folder}' does not load")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json", "more"]
)
def test_a_pipe_in_a_model_folder(model_folder: Path, name: str) -> None:
    (model_folder / name).unlink(missing_ok=True)
    os.mkfifo(model_folder / name)
    for read in (load_model, load_tokenizer, load_config, StreamedLayers):
        refused(lambda read=read: read(model_folder), f"{name} is a pipe or a device, expected a file")


def test_a_file_that_cannot_be_read_is_not_called_damaged(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("cogsym.models.loading.safe_open", fails)
    refused(lambda: load_model(model_folder), "model.safetensors cannot be read (Cannot allocate memory)")
