"""What is measured and checked of each operation: inputs at a model's shape, ours, and PyTorch's own way.

`OPERATIONS` is the one list of them: a new operation gets a function here and a line there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym import ops
from cogsym.bench.models import SHAPES, Shape
from cogsym.ops.attention import attention_pairs

PLAIN = "PyTorch"
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """An operation with inputs to compute.

    Attributes:
        inputs: by the names that `ours` and `plain` give them.
        ours: computes the outputs.
        plain: PyTorch's own ways by label, the fastest there are without compiling.
        differentiated: names of the inputs that get a gradient.
        unit: what bounds it: "B" of memory passed over, or "FLOP".
        work: of one call in each direction, "forward", "backward" or "both".
        reference_bytes: what our reference holds, where that is much.
    """

    inputs: dict[str, Tensor]
    ours: Callable[..., Outputs]
    plain: dict[str, Callable[..., Outputs]]
    differentiated: tuple[str, ...]
    unit: str
    work: Mapping[str, float]
    reference_bytes: int = 0

    def __post_init__(self) -> None:
        for name in self.differentiated:
            self.inputs[name].requires_grad_()

    def gradients(self, outputs: Outputs, dout: Outputs, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """Those of the differentiated inputs."""
        if not self.differentiated:
            return ()
        wanted = [self.inputs[name] for name in self.differentiated]
        return torch.autograd.grad(outputs, wanted, dout, retain_graph=retain_graph)

    def results(self, function: Callable[..., Outputs], dout: Outputs | None = None) -> tuple[list[Tensor], Outputs]:
        """Outputs and gradients, and the gradients of the outputs that they were taken for."""
        outputs = function(**self.inputs)
        if dout is None:
            dout = tuple(torch.ones_like(o) if o.dim() == 0 else torch.randn_like(o) for o in outputs)
        return [*(o.detach() for o in outputs), *self.gradients(outputs, dout)], dout


MakeWorkload = Callable[[Shape, int, int, torch.dtype, torch.device], Workload]


def rms_norm(shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """With the residual addition before it, as a block has it."""
    x, residual = (_random(B, T, shape.width, dtype=dtype, device=device) for _ in range(2))
    weight = torch.rand(shape.width, device=device).to(dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        return ops.rms_norm(x, weight, 1e-5, residual=residual)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        h = x + residual
        return F.rms_norm(h, weight.shape, weight, 1e-5), h

    size = 4 * x.numel() * x.element_size()
    inputs = {"x": x, "residual": residual, "weight": weight}
    return Workload(inputs, ours, {PLAIN: plain}, ("x",), "B", {"forward": size, "backward": size})


def rotary(shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """On the queries where a fused projection left them."""
    D, heads = shape.head_dim, shape.heads
    q = _random(B, T, heads + 2 * shape.kv_heads, D, dtype=dtype, device=device)[:, :, :heads]
    angles = torch.arange(T, device=device)[:, None] * 10000 ** -torch.linspace(0, 1, D // 2, device=device)
    cos, sin = (t[None].to(dtype) for t in (angles.cos(), angles.sin()))

    def ours(q: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        return (ops.rotary(q, cos, sin),)

    def plain(q: Tensor, cos: Tensor, sin: Tensor) -> Outputs:  # as transformers does it
        cos, sin = (torch.cat((t, t), -1)[:, :, None] for t in (cos, sin))
        a, b = q.chunk(2, -1)
        return (q * cos + torch.cat((-b, a), -1) * sin,)

    size = 2 * q.numel() * q.element_size()
    inputs = {"q": q.detach(), "cos": cos, "sin": sin}
    return Workload(inputs, ours, {PLAIN: plain}, ("q",), "B", {"forward": size, "backward": size})


def gated_activation(shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """On the halves of a fused product."""
    gate, up = _random(B, T, 2 * shape.mlp_width, dtype=dtype, device=device).chunk(2, -1)

    def ours(gate: Tensor, up: Tensor) -> Outputs:
        return (ops.gated_activation(gate, up, "silu"),)

    def plain(gate: Tensor, up: Tensor) -> Outputs:
        return (F.silu(gate) * up,)

    size = gate.numel() * gate.element_size()
    inputs = {"gate": gate.detach(), "up": up.detach()}
    return Workload(inputs, ours, {PLAIN: plain}, ("gate", "up"), "B", {"forward": 3 * size, "backward": 5 * size})


def attention(shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Causal, with grouped heads, on slices of a fused projection."""
    H, KV, D = shape.heads, shape.kv_heads, shape.head_dim
    q, k, v = _random(B, T, H + 2 * KV, D, dtype=dtype, device=device).split((H, KV, KV), 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        return (ops.attention(q, k, v, ops.AttentionOptions(D**-0.5))[0],)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)

    product = 2 * B * H * D * attention_pairs(T)
    inputs = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    work = {"forward": 2 * product, "backward": 5 * product}
    return Workload(inputs, ours, {PLAIN: plain}, ("q", "k", "v"), "FLOP", work, reference_bytes=4 * B * H * T**2)


def linear_cross_entropy(shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """The loss of a frozen head, as a model takes it, and the gradient for its hidden states."""
    N, D, V = B * T, shape.width, shape.vocabulary
    hidden = _random(N, D, dtype=dtype, device=device)
    weight = _random(V, D, dtype=dtype, device=device) / D**0.5
    targets = torch.randint(V, (N,), device=device)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        return (ops.linear_cross_entropy(hidden, weight, targets),)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        logits = F.linear(hidden, weight)
        return (F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets),)

    product = 2 * N * D * V
    inputs = {"hidden": hidden, "weight": weight, "targets": targets}
    # Ours has the gradient when it has the loss, so its backward alone says nothing.
    work = {"forward": product, "both": 2 * product}
    return Workload(inputs, ours, {PLAIN: plain}, ("hidden",), "FLOP", work)


def decode_attention(shape: Shape, B: int, T: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Sixteen rows that share a prompt, each with 64 tokens of its own behind it."""
    N, H, KV, D, own, prompt = 16, shape.heads, shape.kv_heads, shape.head_dim, 64, B * T
    q = _random(N, H, D, dtype=dtype, device=device)
    k, v = (_random(prompt + N * own, KV, D, dtype=dtype, device=device) for _ in range(2))
    firsts = prompt + own * torch.arange(N, device=device)
    begins = torch.stack((torch.zeros_like(firsts), firsts), 1)
    ends = torch.stack((torch.full_like(firsts, prompt), firsts + own), 1)
    place = torch.arange(len(k), device=device)
    visible = ((place >= begins[..., None]) & (place < ends[..., None])).any(1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        return (ops.decode_attention(q, k, v, begins, ends, ops.AttentionOptions(D**-0.5)),)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)[0].transpose(0, 1),)

    size = (2 * k.numel() + 2 * q.numel()) * q.element_size()
    return Workload({"q": q, "k": k, "v": v}, ours, {PLAIN: plain}, (), "B", {"forward": size})


# By the names of `cogsym.ops.OPERATIONS`, what makes its workload for B sequences of T tokens.
OPERATIONS: dict[str, MakeWorkload] = {
    "rms_norm": rms_norm,
    "rotary": rotary,
    "gated_activation": gated_activation,
    "attention": attention,
    "decode_attention": decode_attention,
    "linear_cross_entropy": linear_cross_entropy,
}


def directions(make: MakeWorkload) -> tuple[str, ...]:
    """Those in which an operation is timed."""
    return tuple(make(SHAPES["tiny"], 1, 2, torch.float32, torch.device("cpu")).work)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
