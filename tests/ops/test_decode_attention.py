from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cogsym.ops import AttentionOptions, backend, decode_attention, operations
from cogsym.ops.decode_attention import decode_attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# H, KV, D: all kinds of groups, head sizes that no register divides, more queries in a row than a block holds
HEADS = ((9, 3, 64), (4, 2, 24), (3, 1, 7), (2, 2, 96), (70, 1, 16))


def inputs(N: int, S: int, H: int, KV: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q a slice of a fused projection, k and v of a larger buffer with other things between them."""
    q = torch.randn(N, H + 3, D + 8).to(dtype)[:, 1 : H + 1, 3 : D + 3]
    store = torch.randn(S, 2, KV + 1, D + 5).to(dtype)
    return q, store[:, 0, :KV, :D], store[:, 1, 1:, 5:]


def shuffled(lengths: list[int], slack: int = 3) -> tuple[list[tuple[int, int]], int]:
    """Disjoint ranges of these lengths in any order, with a few keys between them that nobody owns; and the end."""
    ranges, place = [(0, 0)] * len(lengths), slack
    for i in torch.randperm(len(lengths)).tolist():
        ranges[i] = (place, place + lengths[i])
        place += lengths[i] + int(torch.randint(0, slack + 1, ()))
    return ranges, place


def generating(N: int) -> tuple[Tensor, Tensor, int]:
    """Three ranges a row: a header that all see, a prompt that neighbours share, and the row's own keys, or none."""
    prompts = [150, 0, 1, 37]
    own = torch.randint(0, 40, (N,)).tolist()
    (header, *ranges), S = shuffled([33, *prompts, *own])
    rows = [[header, ranges[n * len(prompts) // N], ranges[len(prompts) + n]] for n in range(N)]
    return *torch.tensor(rows).unbind(-1), S


def scoring(N: int) -> tuple[Tensor, Tensor, int]:
    """Two ranges a row: a question, and what of its option lies before the scored position, itself included."""
    options = [N // 3, 1, N - N // 3 - 1]
    (question, other, *starts), S = shuffled([140, 5, *options])
    rows = [
        [other if i == 1 else question, (begin, begin + t + 1)]
        for i, (begin, end) in enumerate(starts)
        for t in range(end - begin)
    ]
    return *torch.tensor(rows).unbind(-1), S


def windows(N: int) -> tuple[Tensor, Tensor, int]:
    """One range a row: the last 50 keys, moving along."""
    ends = torch.arange(1, N + 1)[:, None]
    return (ends - 50).clamp(min=0), ends, N + 1


def anything(N: int) -> tuple[Tensor, Tensor, int]:
    """Ranges with nothing in common, every fifth row with none, and one that two blocks of logits do not hold."""
    (long, *ranges), S = shuffled([300, *torch.randint(0, 70, (2 * N,)).tolist()])
    rows = [[(9, 4), (0, 0)] if n % 5 == 4 else [ranges[2 * n], ranges[2 * n + 1]] for n in range(N)]
    rows[N // 2][1] = long
    return *torch.tensor(rows).unbind(-1), S


KINDS = {function.__name__: function for function in (generating, scoring, windows, anything)}


def ours(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, scale: float, sinks: Tensor | None = None, **cap: Any
) -> Tensor:
    return decode_attention(q, k, v, begins, ends, AttentionOptions(scale, sinks=sinks, **cap))


def visible_keys(begins: Tensor, ends: Tensor, S: int) -> Tensor:
    """[N, S], in words: in one of the row's ranges."""
    s = torch.arange(S)
    return ((begins[:, :, None] <= s) & (s < ends[:, :, None])).any(1)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begins: Tensor,
    ends: Tensor,
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """All rows by all keys, under a mask: PyTorch's own kernel, or the formula as written for what it has not."""
    seen = visible_keys(begins, ends, len(k))
    unused = ~seen.any(0)[:, None, None]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.masked_fill(unused, 0).repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    empty = ~seen.any(1)[:, None]
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen & ~empty, -torch.inf)
    if soft_cap is None and sinks is None:
        o = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    else:
        x = q.transpose(0, 1) @ k.mT * scale
        x = (torch.tanh(x / soft_cap) * soft_cap if soft_cap else x) + mask
        x = x if x.dtype == torch.float64 else x.float()
        if sinks is not None:
            x = torch.cat((x, sinks.to(x.dtype)[:, None, None].expand(-1, len(q), 1)), -1)
        o = x.softmax(-1)[..., : k.shape[1]].to(q.dtype) @ v
    return o.transpose(0, 1).masked_fill(empty[:, None], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "soft_cap", "sinks"),
    [
        ("generating", None, False),
        ("scoring", 4.0, False),
        ("windows", None, False),
        ("anything", 4.0, False),
        ("windows", 4.0, True),
        ("anything", None, True),
    ],
)
def test_values(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    kind: str,
    soft_cap: float | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    """In a store where every key that no row sees is NaN."""
    for H, KV, D in HEADS:
        begins, ends, S = KINDS[kind](41)
        q, k, v = inputs(41, S, H, KV, D, dtype)
        unused = ~visible_keys(begins, ends, S).any(0)
        k[unused], v[unused] = torch.nan, torch.nan
        options = {"scale": D**-0.5 * 1.5, "soft_cap": soft_cap, "sinks": torch.randn(H) * 3 if sinks else None}
        got = ours(q, k, v, begins, ends, **options)
        own = dense_attention(q, k, v, begins, ends, **options)
        assert got.is_contiguous()
        values = torch.cat((v, v.abs()), -1).double()
        exact, terms = dense_attention(q.double(), k.double(), values, begins, ends, **options).chunk(2, -1)
        assert_no_worse(got, own, exact, str((H, KV, D)), terms)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_error_over_many_values(
    best_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype
) -> None:
    """Enough of them for a typical error."""
    begins, ends, S = generating(200)
    q, k, v = inputs(200, S, 9, 3, 64, dtype)
    got, own = (f(q, k, v, begins, ends, scale=0.2) for f in (ours, dense_attention))
    exact, terms = (dense_attention(q.double(), k.double(), x.double(), begins, ends, scale=0.2) for x in (v, v.abs()))
    assert_no_worse(got, own, exact, scale=terms)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_many_keys(
    cpu_backend: str, poisoned: None, assert_no_worse: Callable[..., None], dtype: torch.dtype, rows: int
) -> None:
    """Ranges that are cut into parts, in one of which the largest logit lies."""
    q, k, v = inputs(rows, 3000, 8, 1, 64, dtype)
    begins, ends = torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), 3000)
    ends[0] = 2741
    k *= torch.arange(3000).sub(1700).abs().div(-300).exp()[:, None, None].to(dtype) * 2
    got, own = (f(q, k, v, begins, ends, scale=0.1) for f in (ours, dense_attention))
    exact, terms = (dense_attention(q.double(), k.double(), x.double(), begins, ends, scale=0.1) for x in (v, v.abs()))
    assert_no_worse(got, own, exact, scale=terms)


def test_large_logits(cpu_backend: str) -> None:
    """Maxima that grow along the keys, so that sums are brought to a new one again and again."""
    q, k, v = inputs(3, 600, 1, 1, 8, torch.float32)
    k *= torch.arange(600)[:, None, None]
    begins, ends = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[600], [1], [599]])
    exact = dense_attention(q.double(), k.double(), v.double(), begins, ends, 1.0)
    got = ours(q, k, v, begins, ends, scale=1.0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_turn_the_order(cpu_backend: str, scale: float) -> None:
    begins, ends, S = scoring(9)
    q, k, v = inputs(9, S, 4, 2, 16, torch.float64)
    exact = dense_attention(q, k, v, begins, ends, scale)
    torch.testing.assert_close(ours(q, k, v, begins, ends, scale=scale), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("where", "value"), [("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("q", torch.nan)])
@pytest.mark.parametrize("kind", ["scoring", "windows"])
def test_what_is_not_finite_reaches_only_who_sees_it(
    cpu_backend: str, dtype: torch.dtype, kind: str, where: str, value: float
) -> None:
    """One fault, in a key that some rows of a run see and others do not."""
    begins, ends, S = KINDS[kind](40)
    tensors = dict(zip("qkv", inputs(40, S, 6, 2, 32, dtype), strict=True))
    clean = ours(**tensors, begins=begins, ends=ends, scale=0.2)
    place = int(ends[30, -1]) - 1
    tensors[where][30 if where == "q" else place, 1, 3] = value
    o = ours(**tensors, begins=begins, ends=ends, scale=0.2)
    reached = torch.zeros(40, 6, dtype=torch.bool)
    if where == "q":
        reached[30, 1] = True
    else:
        reached[visible_keys(begins, ends, S)[:, place], 3:] = True
        assert 1 < reached[:, 3].sum() < 40
    torch.testing.assert_close(o[~reached], clean[~reached])
    assert o[~reached].isfinite().all() and (~o.isfinite()).any(-1)[reached].all()


def test_rows_alone_or_side_by_side(cpu_backend: str) -> None:
    """The order of rows, which neighbours share, changes nothing but roundings."""
    begins, ends, S = generating(50)
    q, k, v = inputs(50, S, 6, 2, 64, torch.float32)
    o = ours(q, k, v, begins, ends, scale=0.2)
    order = torch.randperm(50)
    other = ours(q[order], k, v, begins[order], ends[order], scale=0.2)
    torch.testing.assert_close(other, o[order])
    for n in (0, 17, 49):
        alone = ours(q[n : n + 1], k, v, begins[n : n + 1], ends[n : n + 1], scale=0.2)
        torch.testing.assert_close(alone[0], o[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_neither_run_nor_threads(cpu_backend: str, dtype: torch.dtype) -> None:
    if cpu_backend == "reference":
        pytest.skip("PyTorch's own sums are cut by threads")
    threads = torch.get_num_threads()
    for begins, ends, S in (generating(30), (torch.tensor([[0]]), torch.tensor([[2500]]), 2500)):
        tensors = inputs(len(begins), S, 6, 2, 64, dtype)
        first = ours(*tensors, begins, ends, scale=0.2)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(ours(*tensors, begins, ends, scale=0.2), first), count
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(("N", "S", "H", "M"), [(0, 5, 4, 2), (3, 0, 4, 2), (3, 5, 4, 0), (3, 5, 0, 1), (0, 0, 0, 0)])
def test_nothing_to_see(best_backend: str, poisoned: None, N: int, S: int, H: int, M: int) -> None:
    q, k, v = inputs(N, S, H, 2, 8, torch.float32)
    ranges = torch.zeros(N, M, dtype=torch.int64)
    o = ours(q, k, v, ranges, ranges, scale=1.0)
    assert torch.equal(o, torch.zeros(N, H, 8))


def test_opcheck(best_backend: str) -> None:
    begins, ends, S = generating(6)
    for sinks, soft_cap in ((None, 2.0), (torch.randn(4), None)):
        arguments = (*inputs(6, S, 4, 2, 8, torch.float32), begins, ends, sinks, 0.3, soft_cap)
        torch.library.opcheck(torch.ops.cogsym.decode_attention.default, arguments)


def test_compiles_to_one_graph(best_backend: str) -> None:
    torch.compiler.reset()
    begins, ends, S = generating(6)
    tensors = inputs(6, S, 4, 2, 8, torch.float32)

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours(q * 2, k, v, begins, ends, scale=0.3) * 3

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), twice(*tensors))


def test_a_gradient_is_refused_not_dropped(best_backend: str) -> None:
    begins, ends, S = generating(6)
    q, k, v = inputs(6, S, 4, 2, 8, torch.float32)
    q = q.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="decode_attention has no gradient but q, k, v or sinks requires one"):
        ours(q, k, v, begins, ends, scale=0.3)
    with torch.no_grad():
        assert not ours(q, k, v, begins, ends, scale=0.3).requires_grad


def test_served_by_the_extension_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    function = operations()["decode_attention"].implementation(torch.zeros(1))
    assert (function is decode_attention_reference) == bool(backend.unavailable("cpp"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": (3, 8)}, ValueError, r"q has shape \(3, 8\), expected \[N, H, D\]"),
        ({"k": (5, 2, 4)}, ValueError, r"k has shape \(5, 2, 4\).*expected both \[S, KV, 8\]"),
        ({"k": (5, 3, 8), "v": (5, 3, 8)}, ValueError, "q has 4 heads and k 3, expected a multiple"),
        ({"ends": torch.zeros(2, 1).long()}, ValueError, r"ends \(2, 1\), expected both \[3, M\]"),
        ({"ends": torch.zeros(3, 1).int()}, TypeError, "ends torch.int32, expected torch.int64"),
        ({"v": torch.ones(5, 2, 8).half()}, TypeError, "have dtypes torch.float32, torch.float32 and torch.float16"),
        ({"q": torch.ones(3, 4, 16)[..., ::2]}, ValueError, "q's last dimension has stride 2, expected 1"),
        ({"begins": torch.tensor([[0], [-1], [0]])}, ValueError, "a range begins at -1.*the store's 5 keys"),
        ({"ends": torch.tensor([[0], [6], [0]])}, ValueError, "a range ends at 6.*the store's 5 keys"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \(2,\), expected \(4,\), one a query head"),
        ({"window": 3}, ValueError, "options has a window, expected none; ranges say which keys a row sees"),
        ({"starts": torch.zeros(3, 1).int()}, ValueError, "options has starts, expected none"),
    ],
)
def test_arguments_that_do_not_fit(best_backend: str, change: dict, error: type[Exception], message: str) -> None:
    ranges = torch.zeros(3, 1, dtype=torch.int64)
    arguments = {"q": (3, 4, 8), "k": (5, 2, 8), "v": (5, 2, 8), "begins": ranges, "ends": ranges, **change}
    tensors = {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        ours(**tensors, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["generating", "windows"])
def test_infinite_values_are_as_in_the_reference(cpu_backend: str, kind: str, dtype: torch.dtype) -> None:
    """Among the values that rows share, of either sign, and one whose probability is 0 or 1."""
    begins, ends, S = KINDS[kind](41)
    q, k, v = inputs(41, S, 4, 2, 24, dtype)
    place = int(begins[20, 0])
    v[place, 0, 3], v[place + 1, 0, 3], v[place + 2, 1, 5] = torch.inf, -torch.inf, torch.inf
    q[:, 2:, 0], k[place + 2, 1] = torch.where(torch.arange(41) % 2 == 0, 1.0, -1.0)[:, None], 0
    k[place + 2, 1, 0] = -3000
    compute = torch.promote_types(dtype, torch.float32)  # says which probabilities are 0
    exact = decode_attention_reference(*(x.to(compute) for x in (q, k, v)), begins, ends, None, 0.3, None)
    got = ours(q, k, v, begins, ends, 0.3).to(compute)
    special = ~exact.isfinite()
    assert exact.isnan().any() and torch.equal(got.isfinite(), ~special)
    assert torch.equal(got[special].nan_to_num(nan=5.0), exact[special].nan_to_num(nan=5.0))
