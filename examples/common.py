"""What the examples share: a model, a few texts, and a way to print what they lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Losses = dict[str, list[float]]  # by what they are of, one a step

TEXTS = [f"{name} {verb} {thing}." for name in ("Ana", "Ben", "Chiku", "Dalia") for verb, thing in
         (("sees", "the river"), ("sings", "a song"), ("buys", "two books"), ("finds", "the way home"))]  # fmt: skip
CHATS = [
    [{"role": "user", "content": f"What does {text.split()[0]} do?"}, {"role": "assistant", "content": text}]
    for text in TEXTS
]
# A base model has no template; this one marks what the assistant says, as TRL's `assistant_only_loss` needs.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content + '\\n' }}{% endif %}{% endfor %}"
)


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model of a folder in float32, and its tokenizer with a padding token and a chat template."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    return model, tokenizer


@contextmanager
def model_folder() -> Iterator[Path]:
    """The folder that the command line names, or that of the small model that comes with cogsym."""
    if len(sys.argv) > 1:
        yield Path(sys.argv[1])
    else:
        with as_file(files("cogsym.demo") / "base") as folder:
            yield folder


def main(losses: Callable[[Path], Losses]) -> None:
    """Run an example and print what it lost."""
    with model_folder() as folder:
        for name, values in losses(folder).items():
            print(f"{name}: {', '.join(f'{value:.5f}' for value in values)}")
