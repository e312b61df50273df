"""From a state to words: the final norm and the head, at the positions that are wanted and no other."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from cogsym import ops
from cogsym.decoder import decoder_of, final_norm_of, layers_of
from cogsym.models import UnknownLayerError, find_head, read_block
from cogsym.models.calls import own_logits
from cogsym.models.guard import why_own
from cogsym.models.norm import KnownNorm
from cogsym.ops.linear_cross_entropy import TokenScores

_ROWS = 256  # whose logits exist at a time where the model makes them itself


class SweepHead:
    """The final norm and the head of a causal language model."""

    def __init__(self, model: Any) -> None:
        """Use the model's."""
        self._model = model
        known = find_head(model)
        self._known = known if known and known.why_logits() is None else None
        self._norm: Any = _final_norm(model) if self._known else None

    def scores(self, hidden: Tensor, targets: Tensor) -> TokenScores:
        """Of each target: its logit, the logsumexp, and the most likely token instead; float32, [states, P] each.

        Args:
            hidden: states before the final norm, [states, P, D].
            targets: int64 [P].
        """
        targets = targets.expand(hidden.shape[:-1])
        if self._known:
            normed = self._norm(hidden)
            weight = self._model.get_output_embeddings().weight
            return ops.token_scores(normed, weight, targets, soft_cap=self._known.soft_cap, scale=self._known.scale)
        pieces = zip(hidden.flatten(0, -2).split(_ROWS), targets.flatten().split(_ROWS), strict=True)
        logit, lse, argmax = (torch.cat(t).view(targets.shape) for t in zip(*starmap(self._own, pieces), strict=True))
        return TokenScores(logit, lse, argmax, lse - logit)

    def logits(self, hidden: Tensor) -> Tensor:
        """All of them, float32, [..., V]."""
        if self._known is None:
            return own_logits(self._model, hidden).float()
        normed = self._norm(hidden)
        logits = self._model.get_output_embeddings()(normed).float() * self._known.scale
        cap = self._known.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _own(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(hidden)
        return logits.gather(-1, targets[:, None])[:, 0], logits.logsumexp(-1), logits.argmax(-1)


def _final_norm(model: Any) -> Any:
    """The norm before the head: ours where it is of the class that the decoder's known layers have."""
    found = final_norm_of(model)
    assert found is not None  # a known head has one before it
    name, module = found
    try:
        block = read_block(layers_of(model)[0], weights_follow=True)
    except UnknownLayerError:
        return module
    for norm in (norm for half in block.halves for norm in (half.norm, half.output_norm)):
        if isinstance(norm, KnownNorm) and type(norm.module) is type(module) and why_own(module) is None:
            return replace(norm, owner=decoder_of(model), name=name)
    return module
