"""How fast is each operation? Forward and backward, on every backend here, beside PyTorch's own way.

Operations that only pass over memory are told in bytes a second beside a copy, those made of products in FLOPs a second
beside a matrix product; both are measured in the same rounds. Every gradient is taken through autograd, for ours and
for PyTorch's; frozen weights get none. Before any timing the results are compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym import ops
from cogsym.bench import floor
from cogsym.bench.case import OURS, ROUNDING, Case, Pending, Setting, difference, dtype_name, one_line
from cogsym.bench.method import Variant
from cogsym.bench.models import Shape, shape_of
from cogsym.ops import backend
from cogsym.ops.attention import attention_pairs

PLAIN = "PyTorch"
LENGTH = 512
ROUNDS, PASSES = 7, 3
# The reference of attention holds several times its logits in float32; above so many bytes of them it is left out.
REFERENCE_LOGITS = 2**30

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """An operation with its inputs.

    Attributes:
        inputs: by the names that `ours` and `plain` give them.
        ours: computes the outputs.
        plain: PyTorch's own way, the fastest there is without compiling.
        differentiated: names of the inputs that get a gradient.
        unit: what bounds it: "B" of memory passed over, or "FLOP".
        work: of one call in each direction.
    """

    inputs: dict[str, Tensor]
    ours: Callable[..., Outputs]
    plain: Callable[..., Outputs]
    differentiated: tuple[str, ...]
    unit: str
    work: dict[str, float]

    def __post_init__(self) -> None:
        for name in self.differentiated:
            self.inputs[name].requires_grad_()

    def gradients(self, outputs: Outputs, dout: Outputs, keep: bool = False) -> tuple[Tensor, ...]:
        """Those of the differentiated inputs."""
        if not self.differentiated:
            return ()
        wanted = [self.inputs[name] for name in self.differentiated]
        return torch.autograd.grad(outputs, wanted, dout, retain_graph=keep)

    def results(self, function: Callable[..., Outputs], dout: Outputs | None = None) -> tuple[list[Tensor], Outputs]:
        """Outputs and gradients, and the gradients of the outputs that they were taken for."""
        outputs = function(**self.inputs)
        if dout is None:
            dout = tuple(torch.ones_like(o) if o.dim() == 0 else torch.randn_like(o) for o in outputs)
        return [*(o.detach() for o in outputs), *self.gradients(outputs, dout)], dout


def pending(setting: Setting) -> list[Pending]:
    """Every operation, direction and model."""
    dtypes = [torch.bfloat16]
    if setting.full:
        dtypes.append(torch.float16 if setting.device.type == "cuda" else torch.float32)
    found = []
    for model in setting.models:
        shape = shape_of(model)
        tokens = (4 if setting.full else 2) * LENGTH
        for dtype in dtypes:
            for name, (make, directions) in OPERATIONS.items():
                for direction in directions:
                    title = f"{shape.name}, {tokens} tokens, {dtype_name(dtype)}: {name}, {direction}"
                    build = partial(case, title, make, direction, shape, tokens // LENGTH, dtype, setting.device)
                    found.append(Pending(title, build, rounds=ROUNDS, passes=PASSES))
    return found


def case(
    title: str,
    make: Callable[..., Operation],
    direction: str,
    shape: Shape,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """One operation in one direction, "forward", "backward" or "both", at a shape, for [rows, LENGTH] tokens."""
    torch.manual_seed(0)
    operation = make(shape, rows, dtype, device)
    truth, dout = operation.results(operation.ours)
    result = Case("ops", title, {}, unit=operation.unit, work=operation.work[direction])
    called = title.rpartition(": ")[2].partition(",")[0]
    result.facts = {"backend": ops.route(called, device, dtype).backend, "dtype": dtype_name(dtype)}
    for label, (function, forced) in _candidates(operation, device).items():
        name = title.rpartition(": ")[2].partition(",")[0]
        logits = rows * shape.heads * LENGTH**2 * 4
        if forced == "reference" and name == "attention" and logits > REFERENCE_LOGITS:
            result.skipped[label] = f"the reference holds all logits, {logits / 2**30:.0f} GiB of them"
            continue
        turn = partial(forced_backend, forced)
        try:
            with turn():
                off = difference(operation.results(function, dout)[0], truth)
                run = _directed(operation, function, direction, dout)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            result.skipped[label] = one_line(error)
            continue
        if off > ROUNDING[dtype]:
            result.different[label] = f"its results are {off:.1e} away from ours"
            continue
        result.variants[label] = Variant(run, turn)
    if operation.unit == "B":
        result.floor, result.floor_work = floor.copy(int(result.work), device), result.work
    else:
        products = floor.Products(dtype, device)
        N = rows * LENGTH
        products.add_linear(N, (shape.mlp_width, shape.width), input_gradient=True, weight_gradient=False)
        result.floor, result.floor_work = products, products.flops
    return result


def _candidates(operation: Operation, device: torch.device) -> dict[str, tuple[Callable[..., Outputs], str | None]]:
    """(function, backend it is forced to), by label; ours first."""
    found: dict[str, tuple[Callable[..., Outputs], str | None]] = {OURS: (operation.ours, None)}
    chosen = "cpp" if device.type == "cpu" else "triton"
    for name in ("triton", "reference") if device.type == "cuda" else ("cpp", "reference"):
        if name != chosen and not backend.unavailable(name):
            found[f"{OURS}, {name}"] = (operation.ours, name)
    return found | {PLAIN: (operation.plain, None)}


@contextlib.contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """COGSYM_BACKEND, for a while; None leaves it as it is."""
    before = os.environ.get("COGSYM_BACKEND")
    if name is not None:
        os.environ["COGSYM_BACKEND"] = name
    try:
        yield
    finally:
        if name is not None:
            del os.environ["COGSYM_BACKEND"]
            if before is not None:
                os.environ["COGSYM_BACKEND"] = before


def _directed(
    operation: Operation, function: Callable[..., Outputs], direction: str, dout: Outputs
) -> Callable[[], object]:
    """What is timed."""
    if direction == "both":
        return lambda: operation.gradients(function(**operation.inputs), dout)
    if direction == "backward":
        outputs = function(**operation.inputs)
        return lambda: operation.gradients(outputs, dout, keep=True)

    def forward() -> None:
        with torch.no_grad():
            function(**operation.inputs)

    return forward


def _rms_norm(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Operation:
    """With the residual addition before it, as a block has it."""
    x, residual = (_random(rows, LENGTH, shape.width, dtype=dtype, device=device) for _ in range(2))
    weight = torch.rand(shape.width, device=device).to(dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        return ops.rms_norm(x, weight, 1e-5, residual=residual)

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        h = x + residual
        return F.rms_norm(h, weight.shape, weight, 1e-5), h

    size = 4 * x.numel() * x.element_size()
    inputs = {"x": x, "residual": residual, "weight": weight}
    return Operation(inputs, ours, plain, ("x",), "B", {"forward": size, "backward": size})


def _rotary(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Operation:
    """On the queries where a fused projection left them."""
    D, heads = shape.head_dim, shape.heads
    q = _random(rows, LENGTH, heads + 2 * shape.kv_heads, D, dtype=dtype, device=device)[:, :, :heads]
    angles = torch.arange(LENGTH, device=device)[:, None] * 10000 ** -torch.linspace(0, 1, D // 2, device=device)
    cos, sin = (t[None].to(dtype) for t in (angles.cos(), angles.sin()))

    def ours(q: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
        return (ops.rotary(q, cos, sin),)

    def plain(q: Tensor, cos: Tensor, sin: Tensor) -> Outputs:  # as transformers does it
        cos, sin = (torch.cat((t, t), -1)[:, :, None] for t in (cos, sin))
        a, b = q.chunk(2, -1)
        return (q * cos + torch.cat((-b, a), -1) * sin,)

    size = 2 * q.numel() * q.element_size()
    inputs = {"q": q.detach(), "cos": cos, "sin": sin}
    return Operation(inputs, ours, plain, ("q",), "B", {"forward": size, "backward": size})


def _gated_activation(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Operation:
    """On the halves of a fused product."""
    gate, up = _random(rows, LENGTH, 2 * shape.mlp_width, dtype=dtype, device=device).chunk(2, -1)

    def ours(gate: Tensor, up: Tensor) -> Outputs:
        return (ops.gated_activation(gate, up, "silu"),)

    def plain(gate: Tensor, up: Tensor) -> Outputs:
        return (F.silu(gate) * up,)

    size = gate.numel() * gate.element_size()
    inputs = {"gate": gate.detach(), "up": up.detach()}
    return Operation(inputs, ours, plain, ("gate", "up"), "B", {"forward": 3 * size, "backward": 5 * size})


def _attention(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Operation:
    """Causal, with grouped heads, on slices of a fused projection."""
    H, KV, D = shape.heads, shape.kv_heads, shape.head_dim
    q, k, v = _random(rows, LENGTH, H + 2 * KV, D, dtype=dtype, device=device).split((H, KV, KV), 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        return (ops.attention(q, k, v, ops.AttentionOptions(D**-0.5))[0],)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)

    product = 2 * rows * H * D * attention_pairs(LENGTH)
    inputs = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
    return Operation(inputs, ours, plain, ("q", "k", "v"), "FLOP", {"forward": 2 * product, "backward": 5 * product})


def _linear_cross_entropy(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Operation:
    """The loss of a frozen head, as a model takes it, and the gradient for its hidden states."""
    N, D, V = rows * LENGTH, shape.width, shape.vocabulary
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
    return Operation(inputs, ours, plain, ("hidden",), "FLOP", {"forward": product, "both": 2 * product})


def _decode_attention(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Operation:
    """Sixteen rows that share a prompt, each with 64 tokens of its own behind it."""
    N, H, KV, D, own, prompt = 16, shape.heads, shape.kv_heads, shape.head_dim, 64, rows * LENGTH
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
    return Operation({"q": q, "k": k, "v": v}, ours, plain, (), "B", {"forward": size})


OPERATIONS: dict[str, tuple[Callable[..., Operation], tuple[str, ...]]] = {
    "rms_norm": (_rms_norm, ("forward", "backward")),
    "rotary": (_rotary, ("forward", "backward")),
    "gated_activation": (_gated_activation, ("forward", "backward")),
    "attention": (_attention, ("forward", "backward")),
    "decode_attention": (_decode_attention, ("forward",)),
    # Ours has the gradient when it has the loss, so its backward alone says nothing.
    "linear_cross_entropy": (_linear_cross_entropy, ("forward", "both")),
}


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)
