"""A model with random weights on disk, as a study of layers that are read from there needs it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cogsym.bench import process

WORDS = "habari ya leo mtoto anasoma kitabu shuleni mama anapika chakula kizuri sana".split()
_WRITE = """
import torch
from cogsym.bench.models import build

model = build(name, None, torch.bfloat16, torch.device("cpu"))
model.save_pretrained(folder, max_shard_size="200MB")
print(model.num_parameters())
"""


def write_model(name: str, folder: Path) -> int:
    """Write a model of a named shape in bfloat16, in files of 200 MB, with a tokenizer of `WORDS`; its parameters.

    In a process of its own: a child's peak begins at what its parent has held.
    """
    parameters = int(process.run_python(_WRITE, name=name, folder=str(folder)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(folder)
    return parameters
