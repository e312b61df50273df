"""What a prepared layer knows of itself: which halves are ours, whether it is frozen, and why not."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cogsym.errors import CogsymError
from cogsym.models import Block, UnknownLayerError, read_block
from cogsym.models.attention import AttentionHalf
from cogsym.models.guard import Watch, why_own
from cogsym.models.half import OwnHalf
from cogsym.training.autograd import Keep
from cogsym.training.keep import Memory
from cogsym.training.streamed import StreamedBlock


class How(NamedTuple):
    """How a layer runs.

    Attributes:
        block: its description; None where all of it runs its own forward.
        reason: why it does; empty where it does not.
        trained: a parameter in it needs a gradient.
        frozen: none does, and its weights can be used without calling their modules, in memory or once they are read.
    """

    block: Block | None
    reason: str
    trained: bool
    frozen: bool

    def attends_by_starts(self, kwargs: Mapping[str, Any], training: bool) -> bool:
        """Whether a call with these keywords and without a cache runs our attention, if the mask allows."""
        block = self.block
        if block is None or not isinstance(block.attention, AttentionHalf) or block.attention.foreign(training):
            return False
        if (training and block.dropout) or wants(block, kwargs, "output_attentions"):
            return False
        return not (self.frozen and why_whole(block, kwargs, training))


class PreparedLayer:
    """Kept on a prepared layer.

    Attributes:
        index: 0 next to the embeddings.
        memory: what frozen layers keep.
        sharded: FSDP2 had sharded it before it was prepared, and its weights are there only while it runs.
        streamed: what computes with it where its weights are on disk.
    """

    def __init__(self, index: int, memory: Memory, sharded: bool, streamed: StreamedBlock | None) -> None:
        self.index, self.memory, self.sharded, self.streamed = index, memory, sharded, streamed
        self._watch: Watch | None = None
        self._how = How(None, "", False, False)
        self._own_attention: dict[str, Block] = {}
        self._decided: tuple[weakref.ref[Any] | None, How] = (None, self._how)

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads its own layer anew."""
        return {"index": self.index, "memory": self.memory, "sharded": self.sharded, "streamed": self.streamed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, layer: nn.Module) -> How:
        """How the layer runs: read once, and again when `Watch` sees that something changed."""
        if self._watch is None or self._watch.changed():
            self._how, self._watch = self._read(layer), Watch(layer)
            self._own_attention = {}
        return self._how

    def decide(self, mask: Tensor, how: How) -> None:
        """Run so where the layer is called with this mask, which tells nothing to any other way."""
        self._decided = weakref.ref(mask), how

    def decided(self, mask: Any) -> How | None:
        """How the layer runs with such a mask, where `decide` said so."""
        of, how = self._decided
        return how if of is not None and mask is not None and of() is mask else None

    def with_own_attention(self, reason: str) -> Block:
        """The block with attention by its module's own forward, for a call that ours cannot serve."""
        assert self._how.block is not None
        if reason not in self._own_attention:
            self._own_attention[reason] = self._how.block.with_own_attention(reason)
        return self._own_attention[reason]

    def refuse(self, *_: Any, **__: Any) -> None:
        """In the place of a layer's own forward, where its weights are on disk.

        Raises:
            CogsymError: always.
        """
        raise CogsymError(
            f"Layer {self.index} is read from disk as cogsym's operations need it, and this call runs the layer's own "
            f"forward ({self._how.reason or 'a cache, attention weights, dropout or torch.compile'}); leave that out, "
            "or load the model into memory."
        )

    def _read(self, layer: nn.Module) -> How:
        trained = any(p.requires_grad for p in layer.parameters())
        if self.sharded:
            return How(None, "it was sharded before the model was prepared", trained, False)
        try:
            block = read_block(layer, weights_follow=self.streamed is not None)
        except UnknownLayerError as error:
            return How(None, str(error), trained, False)
        if all(isinstance(half, OwnHalf) for half in block.halves):
            reasons = dict.fromkeys(half.reason for half in block.halves)
            return How(None, " and ".join(reasons), trained, False)
        if self.streamed is not None:
            return self._read_streamed(layer, block, trained)
        return How(block, "", trained, not trained and all(p.plain() for p in block.projections()))

    def _read_streamed(self, layer: nn.Module, block: Block, trained: bool) -> How:
        """As `_read`: what another library put on modules that are not the ones that compute would do nothing."""
        assert self.streamed is not None
        reason = next(filter(None, (why_own(module, weights_follow=True) for module in layer.modules())), "")
        if not self.streamed.same_modules():
            reason = "its modules were replaced"
        return How(None, reason, trained, False) if reason else How(block, "", trained, not trained)


def wants(block: Block, kwargs: Mapping[str, Any], what: str) -> bool:
    """Whether what transformers reads off a layer's modules, "output_attentions" say, is asked for."""
    configs = (getattr(half.module, "config", None) for half in block.halves)
    return bool(kwargs.get(what) or any(getattr(config, what, False) for config in configs))


def why_whole(block: Block, kwargs: Mapping[str, Any], training: bool) -> str | None:
    """Why a frozen block must run its layer's own forward under autograd, or None.

    Args:
        block: the block.
        kwargs: of the call.
        training: the layer is in training mode.
    """
    if isinstance(block.mlp, OwnHalf) and wants(block, kwargs, "output_router_logits"):
        return "the loss may depend on what its router says"
    return "its own forward draws at random" if training and block.draws() else None


def possible(layer: nn.Module, keep: Keep) -> Keep:
    """What a layer keeps where `keep` was chosen."""
    return "input" if keep == "nothing" and isinstance(layer, FSDPModule) else keep
