from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cogsym.ops import AttentionOptions, attention, attention_gradients, backend, operations
from cogsym.ops.attention_inputs import starts_from_cu_seqlens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# B, T, H, KV, D: odd lengths, head sizes that no register divides, all kinds of groups
SHAPES = ((2, 70, 4, 2, 16), (1, 1, 3, 1, 7), (3, 33, 2, 2, 80), (1, 295, 4, 1, 64), (1, 130, 3, 3, 96))
MASKS = {
    "causal": {},
    "packed": {"starts": True},
    "window": {"window": 37},
    "soft cap": {"soft_cap": 3.0},
    "all": {"starts": True, "window": 50, "soft_cap": 5.0},
    "sinks": {"sinks": True},
    "all and sinks": {"starts": True, "window": 50, "soft_cap": 5.0, "sinks": True},
}


def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, AttentionOptions(sinks=sinks, **options))


def make_starts(B: int, T: int) -> Tensor:
    """Other documents in every row, of any length, one of length 1 among them."""
    rows = []
    for _ in range(B):
        cuts = {0, T} | {int(c) for c in torch.randint(0, T, (3,))}
        rows.append(starts_from_cu_seqlens(torch.tensor(sorted(cuts | {min(cuts - {0}) - 1}))))
    return torch.cat(rows)


def visible_keys(T: int, starts: Tensor | None, window: int | None) -> Tensor:
    """[B or 1, T, T], in words: not the future, not another document, not beyond the window."""
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (s <= t)[None] & ((s > t - window) if window else True)
    return seen if starts is None else seen & (s[None] >= starts[:, :, None])


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    starts: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula, as written; in half precision as transformers' eager attention."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    x = q @ k.mT * scale
    if soft_cap:
        x = torch.tanh(x / soft_cap) * soft_cap
    x = x.masked_fill(~visible_keys(q.shape[2], starts, window)[:, None], -torch.inf)
    x = x if x.dtype == torch.float64 else x.float()
    if sinks is not None:
        x = torch.cat((x, sinks.to(x.dtype)[:, None, None].expand(*x.shape[:3], 1)), -1)
    return (x.softmax(-1)[..., : k.shape[2]].to(q.dtype) @ v).transpose(1, 2), x.logsumexp(-1)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel at the precision of the inputs."""
    seen = visible_keys(q.shape[1], starts, window).expand(q.shape[0], -1, -1)[:, None]
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return o.transpose(1, 2), lse


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as slices of one fused projection, and dout."""
    B, T, H, KV, D = shape
    fused = torch.randn(B, T, H + 2 * KV, D).to(dtype)
    return [*fused.split((H, KV, KV), 2), torch.randn(B, H, T, D).to(dtype).transpose(1, 2)]


def results(function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], **options: object) -> list[Tensor]:
    """o, lse, dq, dk, dv, and dsinks where sinks stand behind dout."""
    q, k, v, dout, *sinks = (t.detach() for t in tensors)
    leaves = [t.requires_grad_() for t in (q, k, v, *sinks)]
    o, lse = function(*leaves, **options)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, dout)]


def magnitudes(
    tensors: list[Tensor],
    o: Tensor,
    lse: Tensor,
    scale: float,
    starts: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> list[Tensor]:
    """Of the terms that o, lse, dq, dk and dv are sums of, by query head; do · v - delta is two terms.

    In dv, e^x makes a relative error of what was an absolute one of x.
    """
    groups = tensors[0].shape[2] // tensors[1].shape[2]
    q, k, v, dout = (t.double().transpose(1, 2) for t in tensors[:4])
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    x = q @ k.mT * scale
    x = torch.tanh(x / soft_cap) * soft_cap if soft_cap else x
    p = (x - lse[..., None]).exp() * visible_keys(q.shape[2], starts, window)[:, None]
    delta = dout * o.transpose(1, 2)
    # Where sinks take part, do · v - delta is not 0 for a query's only key, and what rounds o shows in delta.
    delta = (delta if len(tensors) == 4 else delta.abs()).sum(-1, keepdim=True).abs()
    dx = scale * p * ((dout @ v.mT).abs() + delta)
    logits = scale * (q.abs() @ k.mT.abs()).masked_fill(p == 0, 0).amax(-1)
    dsinks = delta.sum((0, 2, 3))
    return [p @ v.abs(), logits, dx @ k.abs(), dx.mT @ q.abs(), (p * (1 + x.abs())).mT @ dout.abs(), dsinks]


def compare(
    assert_no_worse: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype, mask: dict[str, object]
) -> None:
    tensors = inputs(shape, dtype)
    options = {**mask, "scale": shape[-1] ** -0.5 * 1.5}
    if "starts" in options:
        options["starts"] = make_starts(*shape[:2])
    if options.pop("sinks", None):
        tensors.append(torch.randn(shape[2]).mul(3).to(dtype))
    own_function = exact_attention if "soft_cap" in options or len(tensors) == 5 else flash_attention
    exact = results(exact_attention, [t.double() for t in tensors], **options)
    own = results(own_function, tensors, **options)
    got = results(ours, tensors, **options)
    assert all(t.is_contiguous() for t in got)
    terms = magnitudes(tensors, exact[0], exact[1], **options)[: len(got)]
    names = ("o", "lse", "dq", "dk", "dv", "dsinks")[: len(got)]
    for what, scale, *values in zip(names, terms, got, own, exact, strict=True):
        assert_no_worse(*values, what, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype, mask: str
) -> None:
    for shape in SHAPES:
        compare(assert_no_worse, shape, dtype, MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("mask", ["causal", "all"])
def test_error_over_many_values(
    best_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype, mask: str
) -> None:
    """More keys than a block, more rows than a chunk, and enough values for a typical error."""
    compare(assert_no_worse, (1, 700, 6, 2, 64), dtype, MASKS[mask])


def test_large_logits(cpu_backend: str) -> None:
    """Maxima that grow along the keys, so that sums are brought to a new one again and again."""
    q, k, v = (torch.randn(1, 600, 1, 8) for _ in range(3))
    k = k * torch.arange(600)[None, :, None, None]
    exact = exact_attention(q.double(), k.double(), v.double(), scale=1.0)
    for got, truth in zip(ours(q, k, v, scale=1.0), exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("where", "value"), [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("dout", torch.nan)]
)
def test_what_is_not_finite_reaches_only_who_sees_it(
    cpu_backend: str, dtype: torch.dtype, where: str, value: float
) -> None:
    """Documents of 40, 1 and 59 tokens; the fault is at place 20 of the first, in the first head."""
    starts = starts_from_cu_seqlens(torch.tensor([0, 40, 41, 100]))
    tensors = inputs((1, 100, 4, 2, 24), dtype)
    clean = results(ours, tensors, scale=0.2, starts=starts)
    tensors[("q", "k", "v", "dout").index(where)][0, 20, 0, 3] = value
    o, _, dq, dk, dv = faulty = results(ours, tensors, scale=0.2, starts=starts)

    for name, got, was in zip(("o", "lse", "dq", "dk", "dv"), faulty, clean, strict=True):
        got, was = (x.transpose(1, 2) if name == "lse" else x for x in (got, was))
        assert torch.equal(got[:, 40:], was[:, 40:]), name  # other documents
        assert name not in ("o", "dq") or torch.equal(got[:, :20], was[:, :20]), name  # earlier queries
        later = name in ("dk", "dv") and where in ("q", "dout")  # keys that query 20 does not see
        assert not later or torch.equal(got[:, 21:], was[:, 21:]), name
        assert torch.equal(got[:, :, -1], was[:, :, -1]), name  # another group
    if where in ("k", "v"):
        assert (~o[0, 20:40, :2].isfinite()).any(-1).all() and not dq[0, 20:40, :2].isfinite().any()
    else:
        assert not dq[0, 20, 0].isfinite().any() and not dv[0, :21, 0].isfinite().any()
        assert not dk[0, :21, 0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_values_are_as_in_the_formula(cpu_backend: str, dtype: torch.dtype) -> None:
    """An infinity among the values seen, two of either sign, and one of probability 0 or 1. dv does not depend on v."""
    tensors = inputs((1, 100, 4, 2, 24), dtype)
    q, k, v, _ = tensors
    q[0, :, 2:, 0], k[0, 90, 1] = torch.where(torch.arange(100) % 2 == 0, -1.0, 1.0)[:, None], 0
    k[0, 90, 1, 0] = -5000
    expected = results(ours, tensors, scale=0.2, window=40)[4]
    v[0, 20, 0, 3], v[0, 22, 0, 3], v[0, 30, 0, 5], v[0, 90, 1, 7] = torch.inf, -torch.inf, torch.inf, -torch.inf
    o, _, dq, _, dv = results(ours, tensors, scale=0.2, window=40)

    compute = torch.promote_types(dtype, torch.float32)  # says which probabilities are 0
    keys, values = (x[0].to(compute).repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    seen = visible_keys(100, None, 40)
    x = q[0].to(compute).transpose(0, 1) @ keys.mT * 0.2
    p = x.masked_fill(~seen, -torch.inf).softmax(-1)
    exact = torch.where(seen[..., None], p[..., None] * values[:, None], 0).sum(2)  # [H, T, D]
    special, got = ~exact.isfinite(), o[0].transpose(0, 1).to(compute)
    assert exact[2, 95].isnan().any() and exact[0].isnan().any() and exact[0].isinf().any()
    assert torch.equal(got.isfinite(), ~special)
    assert torch.equal(got[special].nan_to_num(nan=5.0), exact[special].nan_to_num(nan=5.0))
    assert not dq[0].transpose(0, 1)[special.any(-1)].isfinite().any()
    assert torch.equal(dv, expected)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_only_gradients_asked_for(best_backend: str, wanted: tuple[bool, ...]) -> None:
    *tensors, dout = inputs((2, 40, 4, 2, 8), torch.float32)
    tensors.append(torch.randn(4))
    clean = results(ours, [*tensors[:3], dout, tensors[3]], scale=0.4)[2:]
    leaves = [t.detach().requires_grad_(wants) for t, wants in zip(tensors, wanted, strict=True)]
    o, lse = ours(*leaves, scale=0.4)
    assert not lse.requires_grad and o.requires_grad == any(wanted)
    if any(wanted):
        o.backward(dout)
    for leaf, truth, wants in zip(leaves, clean, wanted, strict=True):
        assert leaf.grad is not None if wants else leaf.grad is None
        if wants:
            torch.testing.assert_close(leaf.grad, truth)
    backward = torch.ops.cogsym.attention_backward
    grads = backward(dout, *tensors[:3], o.detach(), lse, None, 0.4, None, None, *wanted[:3])
    assert [bool(grad.numel()) for grad in grads] == list(wanted[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_inputs_give_the_same_gradients(best_backend: str, dtype: torch.dtype) -> None:
    """What a frozen block does: it keeps o and lse and computes q, k and v again, elsewhere in memory."""
    tensors = inputs((2, 65, 4, 2, 32), dtype)
    sinks = torch.randn(4)
    o, lse, *expected = results(ours, tensors, scale=0.2, window=40, sinks=sinks)
    again = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    options = AttentionOptions(0.2, window=40, sinks=sinks)
    grads = attention_gradients(again[3], *again[:3], o, lse, options)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8)])
def test_no_tokens(best_backend: str, shape: tuple[int, ...]) -> None:
    B, T, H, KV, D = shape
    leaves = [torch.randn(B, T, heads, D).requires_grad_() for heads in (H, KV, KV)]
    o, lse = ours(*leaves, scale=1.0)
    o.sum().backward()
    assert o.shape == (B, T, H, D) and lse.shape == (B, H, T)
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_neither_run_nor_threads(cpu_backend: str, dtype: torch.dtype) -> None:
    if cpu_backend == "reference":
        pytest.skip("PyTorch's own sums are cut by threads")
    tensors = inputs((1, 521, 4, 1, 40), dtype)
    threads = torch.get_num_threads()
    first = results(ours, tensors, scale=0.2)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = results(ours, tensors, scale=0.2)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), count
    finally:
        torch.set_num_threads(threads)


def test_gradcheck(cpu_backend: str) -> None:
    leaves = [torch.randn(2, 6, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    starts = torch.tensor([[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    for options in ({}, {"starts": starts, "window": 2, "soft_cap": 1.5}):
        assert torch.autograd.gradcheck(lambda *x, o=options: ours(*x, scale=0.7, **o)[0], leaves)
    leaves.append(torch.randn(4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *x: ours(*x, scale=0.7)[0], leaves)


def test_opcheck(best_backend: str) -> None:
    ops = torch.ops.cogsym
    q, k, v, dout = inputs((2, 9, 4, 2, 8), torch.float64)
    starts = starts_from_cu_seqlens(torch.tensor([0, 4, 9])).expand(2, -1).contiguous()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for where, sink, *extra in ((None, sinks, 0.3, None, None), (starts, None, 0.3, 5, 2.0)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        torch.library.opcheck(ops.attention.default, (*leaves, where, sink, *extra))
        o, lse = (t.detach() for t in ops.attention(q, k, v, where, sink, *extra))
        args = (dout, q, k, v, o, lse, where, *extra, True, False, True)
        torch.library.opcheck(ops.attention_backward.default, args)


def test_compiles_to_one_graph(best_backend: str) -> None:
    torch.compiler.reset()
    tensors = inputs((2, 20, 4, 2, 8), torch.float32)

    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attention(q * 2, k, v, AttentionOptions(0.3, window=7))
        return o * 3, lse

    eager = results(twice, tensors)
    compiled = results(torch.compile(twice, fullgraph=True, backend="aot_eager"), tensors)
    for got, truth in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, truth)


def test_pytorchs_kernel_serves_where_the_extension_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_missing", lambda module: f"{module} does not import")
    calls = []
    for name in ("attention", "attention_backward"):
        by_flash = next(b for b in operations()[name].backends if b.name == "flash")
        function = by_flash.function
        counted = lambda *a, f=function: (calls.append(f.__name__), f(*a))[1]  # noqa: E731
        monkeypatch.setitem(by_flash.__dict__, "function", counted)
    tensors = inputs((2, 70, 4, 2, 16), torch.float32)
    exact = results(exact_attention, [t.double() for t in tensors], scale=0.3)
    for got, truth in zip(results(ours, tensors, scale=0.3), exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)
    assert calls == ["attention", "attention_backward"]
    with_sinks = [*tensors, torch.randn(4)]
    exact = results(exact_attention, [t.double() for t in with_sinks], scale=0.3)
    for got, truth in zip(results(ours, with_sinks, scale=0.3), exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4
    results(ours, tensors, scale=0.3, window=9)
    assert len(calls) == 4  # that kernel has no window


def test_starts_and_cumulative_lengths() -> None:
    starts = starts_from_cu_seqlens(torch.tensor([0, 3, 4, 6]))
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4]] and starts.dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": (2, 5, 8)}, ValueError, r"q has shape \(2, 5, 8\), expected \[B, T, H, D\]"),
        ({"k": (2, 4, 2, 8)}, ValueError, r"k has shape \(2, 4, 2, 8\).*expected both \[2, 5, KV, 8\]"),
        ({"k": (2, 5, 3, 8), "v": (2, 5, 3, 8)}, ValueError, "q has 4 heads and k 3, expected a multiple"),
        ({"starts": torch.zeros(2, 5)}, TypeError, "starts has dtype torch.float32, expected torch.int32"),
        ({"starts": torch.zeros(1, 5).int()}, ValueError, r"starts has shape \(1, 5\), expected \(2, 5\)"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \(2,\), expected \(4,\), one a query head"),
        ({"window": 0}, ValueError, "window is 0, expected at least 1"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap is -1.0, expected a positive bound"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"q": (2, 5, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8), **change}
    tensors = {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        ours(**tensors, scale=1.0)
    with pytest.raises(TypeError, match=r"dtypes torch\.float32, torch\.float16"):
        ours(torch.ones(1, 2, 1, 4), *torch.ones(2, 1, 2, 1, 4).half(), scale=1.0)
