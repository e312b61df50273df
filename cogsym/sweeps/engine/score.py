"""How likely configurations find given continuations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.prefixes import Batch
from cogsym.sweeps.engine.requests import Score, Scored
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.layers.trie import Trie


def score(engine: Engine, head: SweepHead, trie: Trie, requests: Sequence[Score]) -> list[list[Scored]]:
    """The answers of every configuration.

    Tokens that requests begin with together run once, and of all positions only the scored ones meet the head.

    Args:
        engine: the layers.
        head: the head.
        trie: the configurations.
        requests: what is asked; together they are one pass.

    Returns:
        [configuration][request].
    """
    wanted = [(r, i) for r, request in enumerate(requests) for i in range(request.first, len(request.tokens))]
    device = engine.layers.device
    targets = torch.tensor([requests[r].tokens[i] for r, i in wanted]).to(device, non_blocking=True)
    owners = torch.tensor([r for r, _ in wanted]).to(device, non_blocking=True)
    # The state of a token tells the next one; the last tells nobody.
    batch = Batch([request.tokens[:-1] for request in requests], [(r, i - 1) for r, i in wanted])
    ended: list[tuple[int, ...]] = []
    totals: list[Tensor] = []  # of each of them, [2, requests]: read when all is computed, as a GPU is waited for

    def on_ends(configurations: list[tuple[int, ...]], hidden: Tensor) -> None:
        scores = head.scores(hidden, targets)
        total = torch.zeros(len(hidden), 2, len(requests), dtype=torch.float64, device=hidden.device)
        total[:, 0].index_add_(1, owners, -scores.loss.double())
        total[:, 1].index_add_(1, owners, (scores.argmax != targets).double())
        ended.extend(configurations)
        totals.append(total)

    engine.run(trie, batch, on_ends)
    answers = np.zeros((2, len(trie.configurations), len(requests)))
    for same, total in zip(ended, torch.cat(totals).cpu().numpy(), strict=True):
        answers[:, list(same)] = total[:, None]
    counts = [len(request.tokens) - request.first for request in requests]
    return [
        [Scored(float(nats), not missed, n) for nats, missed, n in zip(*row, counts, strict=True)]
        for row in zip(*answers, strict=True)
    ]
