"""A tiny model with its tokenizer on disk, and a little text: what a user brings. Real data, where there are any."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Before torch and transformers are imported. Tiny models are fastest on one thread; tests of threads set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from texts import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cogsym


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-examples", type=int, help="cases of each operation and dtype in tests/ops/test_fuzz.py")
    parser.addoption(
        "--huge", action="store_true", help="run the tests of tensors beyond 2**31 elements, gigabytes each"
    )


def pytest_report_header() -> str:
    from cogsym.ops import backend

    return f"cogsym: {Path(cogsym.__file__).parent}, C++ extension: {backend.unavailable('cpp') or 'built'}"


def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage need not look through it, a tenth of all time."""
    gc.freeze()


@pytest.fixture(scope="session")
def _model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import tiny_model  # every family of transformers, which tests of kernels do without

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    tiny_model("llama", vocab_size=300, attention_dropout=0.1, initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(_model_folder, tmp_path / "base"))


@pytest.fixture(scope="session")
def _text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "news.jsonl"
    lines = [json.dumps({"sw": line, "en": line[::-1]}) for line in sentences(120, seed=1)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture
def text_file(_text_file: Path, tmp_path: Path) -> Path:
    """120 sentences as .jsonl, field "sw", with a made-up other side "en"; a copy that a test may change."""
    return Path(shutil.copy(_text_file, tmp_path))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real text and small models."""
    root = Path(os.environ.get("COGSYM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("no test data: COGSYM_TEST_DATA is not set and ../shared/data does not exist")
    return root


@pytest.fixture
def bf16_checkpoint(model_folder: Path) -> Path:
    """The tiny model with weights in bfloat16."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(model_folder)
    return model_folder


@pytest.fixture
def slow_halves(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the processor multiplies 16 bits slowly; it does."""

    def say(slow: bool) -> None:
        halves = (torch.bfloat16, torch.float16)
        for name in ("cogsym.models.precision", "cogsym.ops.linear"):
            monkeypatch.setattr(importlib.import_module(name), "native", lambda dtype: dtype not in halves or not slow)

    say(True)
    return say
