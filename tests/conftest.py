"""A tiny model with its tokenizer on disk, and a little text: what a user brings. Real data, where there are any."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch and transformers are imported. Tiny models are fastest on one thread; tests of threads set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from command_line import one_complaint, run_cogsym  # noqa: F401 (fixtures)
from texts import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cogsym
from cogsym.ops import backend

# What tests start in processes of their own is the cogsym that is tested, which need not be the one that is installed.
if "site-packages" not in (home := Path(cogsym.__file__).parents[1]).parts:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=0, help="how long tests/faults tries; else each fault once")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the files, and the tests of each, in an order")
    parser.addoption("--fuzz-examples", type=int, help="cases of each operation and dtype in tests/ops/test_fuzz.py")
    parser.addoption(
        "--huge", action="store_true", help="run the tests of tensors beyond 2**31 elements, gigabytes each"
    )


def pytest_report_header() -> str:
    why = "COGSYM_BACKEND" if (tested := backend.forced()) else backend.unavailable("cpp")
    name = tested or ("reference" if why else "cpp")
    return f"cogsym: {Path(cogsym.__file__).parent}, backend of CPU tensors: {name}{f' ({why})' if why else ''}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("shuffle")) is not None:
        chance = random.Random(seed)
        place = {path: chance.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (place[item.path], chance.random()))


def pytest_collection_finish() -> None:
    """What is imported stays: collections of garbage need not look through it, a tenth of all time."""
    gc.freeze()


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Signals that end a process do, in children too: nohup and a shell's "&" have them ignored."""
    ignored = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_IGN}
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in ignored.items():
        signal.signal(number, handler)


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
