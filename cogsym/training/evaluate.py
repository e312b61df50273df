"""What a model knows of a language: bits per byte of its text, and log-probabilities of given answers.

Where the head is one that `cogsym.ops.token_scores` knows, no logits are made: the model runs as it is, hooks, adapters
and all, but for its head, whose input is scored instead, at the positions that count and no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from cogsym import ops
from cogsym.data import PackedDataset
from cogsym.data.packing import IGNORE
from cogsym.models.head import Head, find_head


def bits_per_byte(model: Any, dataset: PackedDataset, batch_size: int = 8) -> float:
    """Bits that the model needs for a byte of text: -Σ log2 p(token | those before it in its document) / bytes.

    Each document stands alone, after a separator. Unlike perplexity the measure does not depend on the tokenizer, so
    models and languages compare.

    Args:
        model: a causal language model of transformers; run in evaluation mode without gradients.
        dataset: documents packed with `seed=None`, so that each token of the text is predicted exactly once.
        batch_size: rows a forward pass.
    """
    return bits(model, dataset, range(len(dataset)), batch_size) / dataset.num_bytes


def bits(model: Any, dataset: Dataset[dict[str, Tensor]], rows: Sequence[int], batch_size: int) -> float:
    """Those of some rows of `dataset`, of which each is a part of the sum that `bits_per_byte` divides."""
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            asked = [dataset[i] for i in rows[start : start + batch_size]]
            batch = {key: torch.stack([row[key] for row in asked]).to(model.device) for key in asked[0]}
            labels = batch.pop("labels")
            nats = nats - _log_probabilities(model, labels, **batch).sum()
    return float(nats) / math.log(2)


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
            sums = _log_probabilities(model, labels.to(model.device), input_ids=ids.to(model.device)).sum(1).tolist()
            for (q, o, _, _), value in zip(chunk, sums, strict=True):
                result[q][o] = value
    return result


def _log_probabilities(model: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
    """log p of each label given the tokens before it; 0 where the label is -100.

    Args:
        model: in evaluation mode.
        labels: int64 [B, T].
        inputs: of the model, [B, T] each.

    Returns:
        float64 [B, T - 1].
    """
    labels = labels[:, 1:]
    scored = labels != IGNORE
    with _scoring_head(find_head(model), labels[scored], scored) as losses:
        logits = model(**inputs, use_cache=False).logits
    if not losses:  # the head has run itself
        # Only scored positions become float32: the logits are the largest tensor of an evaluation.
        logits = logits[:, :-1][scored]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = [F.cross_entropy(logits, labels[scored], reduction="none")]
    result = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    result[scored] = -losses[0].double()
    return result


@contextmanager
def _scoring_head(head: Head | None, targets: Tensor, scored: Tensor) -> Iterator[list[Tensor]]:
    """The model's head puts the loss of each target, [N], into the list and gives no logits, [B, T, 0].

    A head that must run itself does, and the list stays empty.

    Args:
        head: the head, or None.
        targets: int64 [N].
        scored: bool [B, T - 1], the N places whose states give the targets.
    """
    losses: list[Tensor] = []
    if head is None or head.why_logits() is not None:
        yield losses
        return
    module = head.model.get_output_embeddings()

    def score(hidden: Tensor) -> Tensor:
        states = hidden[:, :-1][scored]
        losses.append(ops.token_scores(states, module.weight, targets, soft_cap=head.soft_cap, scale=head.scale).loss)
        return hidden.new_empty(*hidden.shape[:-1], 0)

    module.__dict__["forward"] = score
    try:
        yield losses
    finally:
        del module.__dict__["forward"]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
