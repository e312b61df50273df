"""Rows, tokenizers and tasks on disk, and sweeps of the tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweeps.task_rows import PAIRS, XCOPA, write_rows
from texts import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cogsym


def trained(pre_tokenizer: Any, size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [" ".join(map(str, row.values())) for row in XCOPA + PAIRS] + sentences(100)
    texts += ["A: Answer B: Answer: A = Moja = Tatu = Nne: B"] * 9
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), 400)


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """Merges across blanks and words, so that a token may reach from the question into an option."""
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), 600)


@pytest.fixture
def xcopa(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "xcopa.jsonl", [row | {"label": i} for i, row in enumerate(XCOPA)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """One of each kind, on a few made-up documents."""
    chance, lines = random.Random(0), sentences(60, seed=3)
    rows = [
        {"sw": a, "en": " ".join(b.split()[:3]), "wrong": c, "label": chance.randrange(2)}
        for a, b, c in zip(lines[:20], lines[20:40], lines[40:], strict=True)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    text = {"name": "text", "kind": "text", "data": f"{file}#sw", "language": "sw", "limit": 7}
    choice = {
        "name": "choice", "kind": "choice", "data": str(file), "template": "{en} {option}",
        "options": ["{sw}", "{wrong}"], "label": "label", "limit": 6,
    }  # fmt: skip
    translation = {
        "name": "translation", "kind": "translation", "side": "production", "data": str(file), "language": "sw",
        "template": "{en} = {sw}", "max_new_tokens": 6, "limit": 5, "stops": ["a"],
    }  # fmt: skip
    return [text, choice, translation]


@pytest.fixture
def sweep(model_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`cogsym.sweep` of the tiny model into tmp_path/out; what it says is kept at `.said`."""

    def run(configs: Any, tasks: Any, model: Any = model_folder, out: Path = tmp_path / "out", **more: Any) -> Any:
        console = Console(file=StringIO(), width=80)
        try:
            return cogsym.sweep(model, configs, tasks, out, console=console, **more)
        finally:
            run.said = console.file.getvalue()  # type: ignore[attr-defined]

    return run
