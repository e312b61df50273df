from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import decode_attention as launch
from cogsym.ops import operations
from cogsym.ops.decode_attention import decode_attention_reference

Random = Callable[..., Tensor]
Check = Callable[..., None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# H, KV, D: groups that do and do not divide 16, one larger than that, head sizes that are no power of two
HEADS = ((9, 3, 64), (4, 2, 24), (3, 1, 7), (20, 1, 16))
# Neighbours that share a prompt, rows of their own, growing ranges, empty ones, rows that see nothing
RANGES = [
    [(0, 90), (200, 201), (0, 0)],
    [(0, 90), (201, 209), (9, 3)],
    [(0, 90), (0, 0), (260, 265)],
    [(0, 0), (5, 5), (7, 2)],
    [(90, 91), (209, 230), (0, 0)],
    [(100, 190), (230, 231), (0, 0)],
    [(100, 190), (230, 232), (0, 0)],
    [(100, 190), (230, 233), (90, 91)],
]


def inputs(random: Random, H: int, KV: int, D: int, dtype: torch.dtype, S: int = 270) -> tuple[Tensor, ...]:
    """q and the store as slices of larger buffers; ranges of M = 3."""
    N = len(RANGES)
    q, store = random(N, H + 2, D + 3, dtype=dtype)[:, 1:-1, 3:], random(S, 2, KV + 1, D, dtype=dtype)[:, :, 1:]
    return q, store[:, 0], store[:, 1], *torch.tensor(RANGES).unbind(-1)


def compare(
    arguments: tuple[Tensor, ...],
    scale: float,
    soft_cap: float | None,
    assert_no_worse: Check,
    sinks: Tensor | None = None,
) -> None:
    q, k, v, begins, ends = arguments
    got = launch.decode_attention(q, k, v, begins, ends, sinks, scale, soft_cap)
    plain = decode_attention_reference(q, k, v, begins, ends, sinks, scale, soft_cap)
    # The reference rounds once. Half precision that rounds its probabilities, as every flash kernel does, errs more.
    if q.dtype in (torch.bfloat16, torch.float16):
        plain = plain + torch.finfo(q.dtype).eps / 2 * plain.abs().max()
    truth = decode_attention_reference(q.double(), k.double(), v.double(), begins, ends, sinks, scale, soft_cap)
    terms = decode_attention_reference(q.double(), k.double(), v.double().abs(), begins, ends, sinks, scale, soft_cap)
    assert_no_worse(got, plain, truth, 4 * terms)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize(("H", "KV", "D"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(
    dtype: torch.dtype, H: int, KV: int, D: int, soft_cap: float | None, random: Random, assert_no_worse: Check
) -> None:
    """In a store where every key that no row sees is NaN."""
    q, k, v, begins, ends = inputs(random, H, KV, D, dtype)
    s = torch.arange(len(k))
    unused = ~((begins[..., None] <= s) & (s < ends[..., None])).any(0).any(0)
    assert unused.any()
    k[unused], v[unused] = torch.nan, torch.nan
    compare((q, k, v, begins, ends), D**-0.5 * 1.5, soft_cap, assert_no_worse)


@pytest.mark.parametrize(("H", "KV", "D"), HEADS[1:3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(dtype: torch.dtype, H: int, KV: int, D: int, random: Random, assert_no_worse: Check) -> None:
    """Those of each head; one that takes nearly all, and one that takes nothing."""
    sinks = random(H, dtype=dtype)
    sinks[0], sinks[1] = 30, -torch.inf
    compare(inputs(random, H, KV, D, dtype), D**-0.5, 3.0, assert_no_worse, sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1100, 1500])
def test_keys_dealt_to_several_programs(dtype: torch.dtype, keys: int, random: Random, assert_no_worse: Check) -> None:
    """One row that all splits serve, and in a second call two of which one sees nothing and one a single key."""
    q, k, v, *_ = inputs(random, 4, 1, 16, dtype, S=keys + 3)
    for ranges in ([[(2, keys)]], [[(5, 5)], [(7, 8)]]):
        begins, ends = torch.tensor(ranges).unbind(-1)
        for sinks in (None, 2 * random(4)):
            compare((q[: len(ranges)], k, v, begins, ends), 0.5, None, assert_no_worse, sinks)


@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_reaches_only_who_sees_it(where: str, random: Random) -> None:
    q, k, v, begins, ends = inputs(random, 4, 2, 16, torch.float32)
    {"k": k, "v": v}[where][231, 1, 3] = torch.nan
    o = launch.decode_attention(q, k, v, begins, ends, None, 0.3, None)
    reached = torch.zeros(len(RANGES), 4, dtype=torch.bool)
    reached[6:, 2:] = True
    assert o[~reached].isfinite().all() and o[reached].isnan().any(-1).all()


@pytest.mark.parametrize(("N", "S", "M"), [(0, 5, 2), (3, 0, 2), (3, 5, 0)])
def test_nothing_to_see(N: int, S: int, M: int) -> None:
    ranges = torch.zeros(N, M, dtype=torch.int64)
    o = launch.decode_attention(torch.ones(N, 4, 8), *torch.ones(2, S, 2, 8), ranges, ranges, None, 1.0, None)
    assert torch.equal(o, torch.zeros(N, 4, 8))


def test_public_operation(random: Random) -> None:
    reference = decode_attention_reference
    assert operations()["decode_attention"].implementation(torch.zeros(1)) is launch.decode_attention
    arguments = inputs(random, 4, 2, 8, torch.float64)
    got = cogsym.ops.decode_attention(*arguments, cogsym.ops.AttentionOptions(0.3))
    torch.testing.assert_close(got, reference(*arguments, None, 0.3, None))
