"""From a state to words: the final norm and the head, at the positions that are wanted and no other."""

from __future__ import annotations

from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from cogsym import ops
from cogsym.models import UnknownLayerError, find_head, read_block
from cogsym.models.block import Norm
from cogsym.models.calls import own_logits
from cogsym.ops.linear_cross_entropy import TokenScores

_ROWS = 256  # whose logits exist at a time where the model makes them itself


class SweepHead:
    """The final norm and the head of a causal language model."""

    def __init__(self, model: Any) -> None:
        """Use the model's."""
        self._model = model
        known = find_head(model)
        plain = type(model.get_output_embeddings()) is nn.Linear and model.get_output_embeddings().bias is None
        self._known = known if plain else None
        self._norm: Any = _final_norm(model.get_decoder()) if self._known else None

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


def _final_norm(decoder: Any) -> Any:
    """The norm before the head: ours where it is the module that the decoder's known layers have."""
    try:
        like = read_block(decoder.layers[0]).norms()[0]
    except UnknownLayerError:
        return decoder.norm
    same = type(decoder.norm) is type(like.module) and "forward" not in vars(decoder.norm)
    hooked = decoder.norm._forward_hooks or decoder.norm._forward_pre_hooks
    return Norm(decoder, "norm", like.offset) if same and not hooked else decoder.norm
