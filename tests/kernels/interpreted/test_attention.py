from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cogsym.kernels import attention as launch
from cogsym.ops import operations
from cogsym.ops.attention import attention_backward_reference, attention_reference

Random = Callable[..., Tensor]
Check = Callable[..., None]
# H, KV, D: groups that do and do not divide a tile, features that are no power of two
HEADS = ((6, 2, 24), (5, 1, 7))
# starts, window, soft cap, sinks
KINDS = {
    "whole": (None, None, None, False),
    "packed": ("packed", None, None, False),
    "padded": ("padded", 9, None, False),
    "overlapping": ("overlapping", None, 3.0, False),
    "window": (None, 40, None, True),
}


def starts_of(kind: str | None, B: int, T: int) -> Tensor | None:
    if kind is None:
        return None
    starts = torch.zeros(B, T, dtype=torch.int32)
    for row in starts:
        if kind == "packed":
            for begin in sorted(torch.randperm(T)[: T // 20 + 1].tolist()):
                row[begin:] = begin
        elif kind == "padded":  # padding in front, each token a sequence of its own
            n = int(torch.randint(T // 2 + 1, ()))
            row[:n], row[n:] = torch.arange(n, dtype=torch.int32), n
        else:
            row.copy_(torch.arange(T) // 2)
    return starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("H", "KV", "D"), HEADS)
def test_values_and_gradients(
    H: int, KV: int, D: int, kind: str, dtype: torch.dtype, random: Random, assert_no_worse: Check
) -> None:
    """Several tiles and a part of one, on slices of a fused projection."""
    B, T = 2, 60 if dtype == torch.float64 else 100
    which, window, soft_cap, with_sinks = KINDS[kind]
    starts, scale = starts_of(which, B, T), D**-0.5
    q, k, v = random(B, T, H + 2 * KV, D, dtype=dtype).split((H, KV, KV), 2)
    do, sinks = random(B, T, H, D, dtype=dtype), random(H, dtype=dtype) if with_sinks else None
    options = (scale, window, soft_cap)

    def exact(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    o, lse = launch.attention(q, k, v, starts, sinks, *options)
    truth, true_lse = attention_reference(*map(exact, (q, k, v)), starts, exact(sinks), *options)
    plain, plain_lse = attention_reference(q, k, v, starts, sinks, *options)
    grads = launch.attention_backward(do, q, k, v, plain, plain_lse, starts, *options, True, True, True)
    needs = (True, True, True)
    plains = attention_backward_reference(do, q, k, v, plain, plain_lse, starts, *options, *needs)
    truths = attention_backward_reference(*map(exact, (do, q, k, v, plain)), true_lse, starts, *options, *needs)
    assert_no_worse(lse, plain_lse, true_lse, true_lse.abs() + 1)
    for got, own, true in zip((o, *grads), (plain, *plains), (truth, *truths), strict=True):
        assert got.is_contiguous() and got.dtype == dtype
        if dtype == torch.bfloat16:  # the reference rounds once; p and dx are rounded too, as every flash kernel does
            own = own + torch.finfo(dtype).eps * own.double().abs().max()
        assert_no_worse(got, own, true, 4 * true.abs().max())


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(needs: tuple[bool, bool, bool], random: Random) -> None:
    q, k, v, do = (random(1, 20, 2, 16, dtype=torch.float32) for _ in range(4))
    o, lse = launch.attention(q, k, v, None, None, 0.25, None, None)
    every = launch.attention_backward(do, q, k, v, o, lse, None, 0.25, None, None, True, True, True)
    some = launch.attention_backward(do, q, k, v, o, lse, None, 0.25, None, None, *needs)
    for got, expected, need in zip(some, every, needs, strict=True):
        assert torch.equal(got, expected) if need else not got.numel()


def test_other_documents_do_not_reach_in(random: Random) -> None:
    """What lies in another document of the row, or beyond the sequence, has no share in a bit of the outcome."""
    starts = torch.tensor([[0] * 64 + [64] * 64], dtype=torch.int32)
    q, k, v = (random(1, 128, 2, 16, dtype=torch.float32) for _ in range(3))
    o, lse = launch.attention(q, k, v, starts, None, 0.25, None, None)
    k[:, :64], v[:, :64] = 1e4, -3e4
    again, lse_again = launch.attention(q, k, v, starts, None, 0.25, None, None)
    assert torch.equal(o[:, 64:], again[:, 64:]) and torch.equal(lse[..., 64:], lse_again[..., 64:])


def test_a_query_that_sees_nothing_has_zeros(random: Random) -> None:
    q, k, v = (random(1, 10, 1, 16, dtype=torch.float32) for _ in range(3))
    starts = torch.full((1, 10), 20, dtype=torch.int32)
    o, lse = launch.attention(q, k, v, starts, None, 0.25, None, None)
    assert not o.any() and (lse == -torch.inf).all()


def test_registered_for_what_the_library_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    attention, cuda = operations()["attention"], torch.device("cuda")
    assert attention.route(cuda, torch.bfloat16).backend == "flash"
    for facts in ({"soft_cap": 30.0}, {"sequences": "by starts"}):
        assert attention.route(cuda, torch.bfloat16, **facts).backend == "triton"
    assert attention.route(cuda, torch.float32, head_dim=64).backend == "triton"
    assert attention.route(cuda, torch.float32, head_dim=128).backend == "reference"
    assert attention.route(cuda, torch.bfloat16, head_dim=320).backend == "reference"
