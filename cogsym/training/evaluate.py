"""What a model knows of a language: bits per byte of its text, and log-probabilities of given answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.data import PackedDataset


def bits_per_byte(model: Any, dataset: PackedDataset, batch_size: int = 8) -> float:
    """Bits that the model needs for a byte of text: -Σ log2 p(token | those before it in its document) / bytes.

    Each document stands alone, after a separator. Unlike perplexity the measure does not depend on the tokenizer, so
    models and languages compare.

    Args:
        model: a causal language model of transformers; run in evaluation mode without gradients.
        dataset: documents packed with `seed=None`, so that each token of the text is predicted exactly once.
        batch_size: rows a forward pass.
    """
    nats = 0.0
    with _evaluating(model):
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = {key: torch.stack([row[key] for row in rows]).to(model.device) for key in rows[0]}
            labels = batch.pop("labels")
            nats -= _log_probabilities(model(**batch, use_cache=False).logits, labels).sum().item()
    return nats / math.log(2) / dataset.num_bytes


def option_log_probabilities(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[str, Sequence[str]]],
    separator_id: int,
    batch_size: int = 32,
) -> list[list[float]]:
    """log p(option | context) in nats, summed over the option's tokens, for each option of each question.

    Context and option are tokenised apart, so that options of a question share their context token by token; an option
    begins with the blank that divides it from the context.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        questions: (context, options) each.
        separator_id: the token before the context, as in training.
        batch_size: options a forward pass; they are sorted by length first.
    """
    encode = tokenizer.backend_tokenizer.encode
    rows = []
    for q, (context, options) in enumerate(questions):
        prefix = [separator_id, *encode(context, add_special_tokens=False).ids]
        for o, option in enumerate(options):
            tokens = encode(option, add_special_tokens=False).ids
            rows.append((q, o, prefix + tokens, [-100] * len(prefix) + tokens))
    rows.sort(key=lambda row: len(row[2]))
    result = [[0.0] * len(options) for _, options in questions]
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            longest = len(chunk[-1][2])
            # Padding stands on the right and attention looks left, so no mask is needed.
            ids = torch.tensor([tokens + [separator_id] * (longest - len(tokens)) for _, _, tokens, _ in chunk])
            labels = torch.tensor([wanted + [-100] * (longest - len(wanted)) for _, _, _, wanted in chunk])
            logits = model(ids.to(model.device), use_cache=False).logits
            sums = _log_probabilities(logits, labels.to(model.device)).sum(1).tolist()
            for (q, o, _, _), value in zip(chunk, sums, strict=True):
                result[q][o] = value
    return result


def _log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label given the logits one position earlier; 0 where the label is -100. [B, T - 1], float64."""
    labels = labels[:, 1:]
    wanted = labels != -100
    # Only scored positions become float32: the logits are the largest tensor of an evaluation.
    values = -F.cross_entropy(logits[:, :-1][wanted].float(), labels[wanted], reduction="none")
    result = torch.zeros(labels.shape, dtype=torch.float64, device=logits.device)
    result[wanted] = values.double()
    return result


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
