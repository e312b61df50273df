"""A decoder block: two halves and how they stand to each other.

    sequential    h = x + attention(x),  y = h + mlp(h)        Llama, and most
    parallel      y = x + attention(x) + mlp(x)                Cohere; both may read one norm

A half's contribution to the stream is `cogsym.models.half`'s. A block holds references to the model's own modules and
reads them at each call: no weight is copied, and a module that is replaced (by peft, say) keeps working.

Bytes that a frozen block keeps for a token of a stream D wide, with element size s, H query and G key heads of size d,
and F wide in the MLP, where both halves are ours:

    "all"         s (2 D + (2 H + 2 G) d + 2 F) + 4 H      x, h, q, k, v, o, lse, g, u
    "attention"   s (2 D + H d) + 4 H                      x, h, o, lse
    "input"       s D                                      x

A parallel block has no h. A norm behind attention keeps what it normalises instead of h, from which h follows; one
behind the MLP keeps what it normalises too, s D more in the first two. A half that runs its own forward keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from cogsym.models.attention import Attend, AttentionHalf
from cogsym.models.half import Dial, Half, Kept, OwnHalf, Product
from cogsym.models.inputs import LayerInputs, Positions
from cogsym.models.projections import Projections


@dataclass
class KeptBlock:
    """What a frozen block's forward leaves for the gradient of its input.

    Attributes:
        x: the block's input, [B, T, D].
        h: the stream between the halves, where it is kept.
        attention: what the attention half keeps.
        mlp: what the MLP half keeps.
    """

    x: Tensor
    h: Tensor | None = None
    attention: Kept = field(default_factory=dict)
    mlp: Kept = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder layer of a Hugging Face model, described.

    Attributes:
        attention: its attention.
        mlp: its MLP.
        parallel: both halves read the block's input.
        dropout: share of what the halves add that is dropped in training, which only the layer's own forward does.
    """

    attention: Half
    mlp: Half
    parallel: bool = False
    dropout: float = 0.0

    @property
    def halves(self) -> tuple[Half, Half]:
        """Both."""
        return self.attention, self.mlp

    def projections(self) -> tuple[Projections, ...]:
        """The linear maps that are computed here, in the order of the forward pass."""
        return (*self.attention.projections(), *self.mlp.projections())

    def positions(self, inputs: LayerInputs, x: Tensor, training: bool) -> Positions | None:
        """What our attention takes; None where the module attends by its own forward.

        Raises:
            UnknownMaskError: our attention cannot compute what the mask, or the model's implementation, asks.
        """
        if not isinstance(self.attention, AttentionHalf):
            return None
        return self.attention.positions(inputs, x, training)

    def with_own_attention(self, reason: str) -> Block:
        """The block with attention by its module's own forward."""
        return replace(self, attention=self.attention.on_own_forward(reason))

    def draws(self) -> bool:
        """Whether a half that runs its own forward draws at random in training."""
        return any(isinstance(half, OwnHalf) and half.draws() for half in self.halves)

    # Under autograd.

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """The block's output, [B, T, D] like `x`, under autograd.

        Args:
            x: the residual stream, [B, T, D].
            inputs: the layer's keywords; without `positions` the model's own implementation attends, with its cache.
        """
        n = self.attention.normed(x)
        added = self.attention.contribution(self.attention.forward(n, inputs))
        if self.parallel:
            m = n if self._one_norm else self.mlp.normed(x)
            return x + added + self.mlp.contribution(self.mlp.forward(m, inputs))
        m, h = self.mlp.norm.after_adding(added, x) if self.mlp.norm else (x + added,) * 2
        return h + self.mlp.contribution(self.mlp.forward(m, inputs))

    # Frozen: outside autograd.

    def run(self, x: Tensor, inputs: LayerInputs, dial: Dial) -> tuple[Tensor, KeptBlock]:
        """(y, what is kept). Call it without autograd."""
        kept = KeptBlock(x)
        n = self.attention.normed(x)
        projected = self.attention.run(n, inputs, kept.attention)
        _drop(kept.attention, self.attention.kept(dial))
        added = self.attention.contribution(projected)
        if self.parallel:
            m = n if self._one_norm else self.mlp.normed(x)
            h = x + added
        else:
            m, h = self.mlp.norm.after_adding(added, x) if self.mlp.norm else (x + added,) * 2
            if dial != "input" and self.attention.output_norm is None:
                kept.h = h
        del n, projected, added
        down = self.mlp.run(m, inputs, kept.mlp)
        _drop(kept.mlp, self.mlp.kept(dial))
        return h + self.mlp.contribution(down), kept

    def input_gradient(self, dy: Tensor, kept: KeptBlock, inputs: LayerInputs) -> Tensor:
        """dx, [B, T, D] in the dtype of x. Call it without autograd; it uses `kept` up."""
        x = kept.x
        if self.parallel:
            dn = self._through(self.attention, dy, x, kept.attention, inputs)
            dm = self._through(self.mlp, dy, x, kept.mlp, inputs)
            if self._one_norm:
                return _through_norm(self.attention, dn + dm, x, dy)
            return _through_norm(self.attention, dn, x, _through_norm(self.mlp, dm, x, dy))
        h = kept.h if kept.h is not None else self._stream_between(kept, inputs)
        kept.h = None
        dh = _through_norm(self.mlp, self._through(self.mlp, dy, h, kept.mlp, inputs), h, dy)
        del h
        return _through_norm(self.attention, self._through(self.attention, dh, x, kept.attention, inputs), x, dh)

    def _stream_between(self, kept: KeptBlock, inputs: LayerInputs) -> Tensor:
        """h, from what attention gave, or computed again."""
        projected = kept.attention.get(Half.PROJECTED)
        if projected is None:
            projected = self.attention.recall(self.attention.normed(kept.x), inputs, kept.attention, True)
        assert projected is not None
        return kept.x + self.attention.contribution(projected)

    def _through(self, half: Half, dy: Tensor, x: Tensor, kept: Kept, inputs: LayerInputs) -> Tensor:
        """The gradient of what a half takes, its norm behind it, from that of the stream."""
        if half.lacks(kept):
            half.recall(half.normed(x), inputs, kept, need_projected=half.output_norm is not None)
        dprojected = half.projected_gradient(dy, kept)
        return half.input_gradient(dprojected, lambda: half.normed(x), inputs, kept)

    # In a sweep: in place, outside autograd.

    def add_attention(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, attend: Attend, both: bool = False
    ) -> None:
        """Add attention's contribution to x, in place.

        Args:
            x: the residual stream, [B, T, D].
            cos: [B or 1, T, R/2].
            sin: like `cos`.
            attend: attention.
            both: add the MLP's contribution of a parallel block too.
        """
        half, n = self._our_attention, self.attention.normed(x)
        m = (n if self._one_norm else self.mlp.normed(x)) if both else None
        half.add(x, half.attended(n, cos, sin, attend))
        if m is not None:
            self.mlp.add(x, self.mlp.forward(m, LayerInputs()))

    def add_mlp(self, x: Tensor) -> None:
        """Add the MLP's contribution to x, [B, T, D], in place."""
        self.mlp.add(x, self.mlp.forward(self.mlp.normed(x), LayerInputs()))

    def attention_added_at(
        self, x: Tensor, rows: Tensor, cos: Tensor | None, sin: Tensor | None, attend: Attend, both: bool = False
    ) -> Tensor:
        """x with attention's contribution at some positions only, [B, P, D]; keys and values are those of all.

        Args:
            x: the residual stream, [B, T, D]; left as it is.
            rows: the positions, int64 [P].
            cos: [B or 1, T, R/2].
            sin: like `cos`.
            attend: attention of the chosen queries to all keys.
            both: add the MLP's contribution of a parallel block too.
        """
        half, n, chosen = self._our_attention, self.attention.normed(x), x[:, rows]
        m = (n[:, rows] if self._one_norm else self.mlp.normed(chosen)) if both else None
        half.add(chosen, half.attended_at(n, rows, cos, sin, attend))
        if m is not None:
            self.mlp.add(chosen, self.mlp.forward(m, LayerInputs()))
        return chosen

    # What it takes.

    def products(self, rows: int) -> list[Product]:
        """The matrix products of both halves by weights, forward."""
        return [*self.attention.products(rows), *self.mlp.products(rows)]

    def kept_bytes(self, dial: Dial, element_size: int, stream_size: int) -> int:
        """Bytes that a frozen block keeps for a token.

        Args:
            dial: how much.
            element_size: bytes of an element of the products.
            stream_size: of the residual stream.
        """
        halves = sum(half.kept_bytes(dial, element_size) for half in self.halves)
        between = dial != "input" and not self.parallel and self.attention.output_norm is None
        return stream_size * self.attention.width * (2 if between else 1) + halves

    def forward_flops(self, length: int) -> int:
        """Multiplications and additions of a row of `length` tokens, where a half's are known."""
        return sum(p.flops for p in self.products(length)) + sum(half.mixing_flops(length) for half in self.halves)

    def gradient_flops(self, length: int) -> int:
        """Those of the input gradient, nothing repeated."""
        mixing = sum(half.mixing_flops(length) for half in self.halves)
        return sum(p.flops for p in self.products(length)) + mixing * 5 // 2

    def working_elements(self) -> int:
        """Elements that lie between the products for a token while a block is computed."""
        attention, mlp = (half.products(1) for half in self.halves)
        mixing = sum(3 * p.outputs for p in attention[:1])
        hidden = sum(p.outputs for p in mlp[:1]) + sum(p.inputs for p in mlp[1:])
        return (3 + self.parallel) * self.attention.width + max(mixing, hidden)  # one half, then the other

    def repeated_flops(self, dial: Dial, length: int) -> int:
        """Those that the input gradient repeats where a dial kept no more."""
        return sum(self._repeated(dial, length))

    def _repeated(self, dial: Dial, length: int) -> Iterator[int]:
        for half, needed in ((self.attention, not self.parallel), (self.mlp, False)):
            again = half.repeated(dial, needed)
            yield from (p.flops for p in half.products(length) if p.name in again)
            yield half.mixing_flops(length) if "mixing" in again else 0

    @property
    def _one_norm(self) -> bool:
        return self.attention.norm is self.mlp.norm

    @property
    def _our_attention(self) -> AttentionHalf:
        assert isinstance(self.attention, AttentionHalf)
        return self.attention


def _drop(kept: Kept, wanted: tuple[str, ...]) -> None:
    for name in set(kept) - set(wanted):
        del kept[name]


def _through_norm(half: Half, gradient: Tensor, x: Tensor, stream: Tensor) -> Tensor:
    """The gradient of x, from that of what the half's norm gives and that of the stream past it."""
    if half.norm is None:
        return stream + gradient
    return half.norm.input_gradient(gradient.to(x.dtype), x, stream)
