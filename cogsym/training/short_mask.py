"""Which keys a query sees, told to prepared layers in place of transformers' mask of all pairs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cogsym.decoder import layers_of
from cogsym.models import Block
from cogsym.models.attachment import attached, attachment
from cogsym.models.attention import AttentionHalf
from cogsym.models.calls import layer_calls
from cogsym.models.masks import UnknownMaskError, mask_ahead, visible_keys
from cogsym.training.layer import PreparedLayer


class PreparedDecoder:
    """Kept on a prepared decoder.

    Attributes:
        tells_documents_apart: its masks say that documents which positions pack do not see each other.
    """

    def __init__(self, decoder: Any, blocks: Sequence[Block | None]) -> None:
        """Ask the decoder what it makes of positions, where attention is ours in all layers and it can be asked."""
        ours = all(block is not None and isinstance(block.attention, AttentionHalf) for block in blocks)
        self._short = ours and type(decoder).__module__.startswith("transformers.models.")
        self.tells_documents_apart = False
        if self._short:
            embeddings = getattr(decoder.get_input_embeddings(), "weight", None)
            if isinstance(embeddings, nn.Parameter) and not (embeddings.is_meta or isinstance(embeddings, DTensor)):
                self.tells_documents_apart = _tells_documents_apart(decoder, embeddings.device)
            else:
                self._short = False

    def with_short_mask(
        self, decoder: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The keywords of a call with `mask_ahead` for a mask, where attention is ours in all layers.

        Args:
            decoder: the decoder.
            forward: of prepared layers.
            args: of the call: none, or the tokens' ids.
            kwargs: its keywords.
        """
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens: Tensor | None = next((x for x in given if x is not None), None)
        use_cache = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if use_cache or kwargs.get("past_key_values") is not None or torch.compiler.is_compiling():
            return kwargs
        if not self._short or tokens is None:
            return kwargs
        decided = []
        for layer in layers_of(decoder):
            known: PreparedLayer | None = attachment(layer)
            # One that is sharded by itself has its weights, which decide how it runs, only when it is called.
            if known is None or not attached(layer, forward) or isinstance(layer, FSDPModule):
                return kwargs
            how = known.read(layer)
            if not how.attends_by_starts(kwargs, layer.training):
                return kwargs
            decided.append((known, how))
        mask = mask_ahead(
            kwargs.get("attention_mask"),
            kwargs.get("position_ids") if self.tells_documents_apart else None,
            tokens.shape[1],
            tokens.device,
            blind_queries=decoder.config._attn_implementation != "eager",
        )
        if mask is None:
            return kwargs
        for known, how in decided:
            known.decide(mask, how)
        return kwargs | {"attention_mask": mask}


@torch.no_grad()
def _tells_documents_apart(decoder: Any, device: torch.device) -> bool:
    """Whether the third of four tokens, with which a document begins, sees none before it in any layer."""
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _, calls = layer_calls(decoder, input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]], device=device))
    try:
        starts = [visible_keys(call.get("attention_mask"), 4).starts for call in calls]
    except UnknownMaskError:
        return False
    return all(of_layer is not None and int(of_layer[0, 2]) == 2 for of_layer in starts)
