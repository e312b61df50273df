from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cogsym.ops import rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (D, R): whole heads, odd ones, partial rotary, nothing turned, more pairs than a kernel's tile
HEADS = ((64, 64), (2, 2), (7, 6), (33, 14), (80, 20), (5, 0), (1027, 1026))


def exact_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, turned by multiplication, in float64."""
    R = 2 * cos.shape[-1]
    pairs = x[..., :R].unflatten(-1, (-1, 2) if interleaved else (2, -1)) if R else x[..., :0].unsqueeze(-1)
    dim = -1 if interleaved else -2
    turned = torch.complex(*pairs.unbind(dim)) * torch.complex(cos, sin)[:, :, None] if R else pairs
    turned = torch.stack((turned.real, turned.imag), dim) if R else pairs
    return torch.cat((turned.flatten(-2), x[..., R:]), -1)


def transformers_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`apply_rotary_pos_emb` as transformers writes it for Llama and, interleaved, for GLM."""
    R = 2 * cos.shape[-1]
    turned = x[..., :R]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1).unsqueeze(2) for t in (cos, sin))
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), -1).unsqueeze(2) for t in (cos, sin))
        half = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
    return torch.cat(((turned * cos + half * sin).to(x.dtype), x[..., R:]), -1)


def angles(B: int, T: int, R: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(B, T, R // 2) * 6.28
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "R"), HEADS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_values_and_gradient(
    cpu_backend: str,
    poisoned: None,
    assert_no_worse: Callable[..., None],
    D: int,
    R: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    B, T, H = 2, 3, 5
    layouts = {
        "contiguous": torch.randn(B, T, H, D),
        "one head": torch.randn(B, T, 1, D),
        "heads first": torch.randn(B, H, T, D).transpose(1, 2),
        "slice of qkv": torch.randn(B, T, (H + 4) * D + 1)[..., D : (H + 1) * D].unflatten(-1, (H, D)),
        "features first": torch.randn(D, B, T, H).movedim(0, -1),
        "channels last": torch.randn(B, H, D, T).permute(0, 3, 1, 2),
    }
    for (layout, x), batch in zip(layouts.items(), (1, B, 1, B, 1, B), strict=True):
        x = x.to(dtype)
        cos, sin = (t.to(dtype) for t in angles(batch, T, R))
        dy = torch.randn_like(x)
        results = []
        for function, to in ((rotary, dtype), (transformers_rotary, dtype), (exact_rotary, torch.float64)):
            leaf = x.detach().to(to).requires_grad_()
            arguments = {"interleaved": interleaved}
            y = function(leaf, cos.to(to), sin.to(to), **arguments)
            results.append((y, *torch.autograd.grad(y, leaf, dy.to(to))))
        assert results[0][0].is_contiguous()
        for what, *values in zip(("y", "dx"), *results, strict=True):
            assert_no_worse(*values, f"{what}, {layout}")


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cos_and_sin_of_another_dtype_and_strided(
    cpu_backend: str, assert_no_worse: Callable[..., None], dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    x = torch.randn(2, 4, 3, 20).to(dtype)
    cos, sin = (t.to(table_dtype) for t in angles(2, 4, 10))
    exact = exact_rotary(x.double(), cos.double(), sin.double(), False)
    own = transformers_rotary(x, cos.to(dtype), sin.to(dtype), False)
    wide = torch.cat((cos, sin), -1)
    columns = wide.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for table in (wide, columns, wide.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_no_worse(rotary(x, table[..., :5], table[..., 5:]), own, exact)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [20, 8])
def test_queries_and_keys_side_by_side(cpu_backend: str, interleaved: bool, R: int) -> None:
    """In one call on the product that holds both, whole or partial, as in two."""
    H, KV, D = 6, 2, 20
    heads = torch.randn(2, 4, (H + 2 * KV) * D + 3)[..., : (H + 2 * KV) * D].unflatten(-1, (-1, D))
    both, (q, k, _) = heads[:, :, : H + KV], heads.split((H, KV, KV), 2)
    cos, sin = angles(2, 4, R)
    turned = rotary(both, cos, sin, interleaved=interleaved)
    apart = torch.cat([rotary(x, cos, sin, interleaved=interleaved) for x in (q, k)], 2)
    assert torch.equal(turned, apart)


def test_turning_back_is_the_inverse(cpu_backend: str) -> None:
    x = torch.randn(2, 4, 3, 20, dtype=torch.float64)
    cos, sin = (t.double() for t in angles(1, 4, 20))
    cos, sin = cos / (cos.square() + sin.square()).sqrt(), sin / (cos.square() + sin.square()).sqrt()
    y = torch.ops.cogsym.rotary(x, cos, sin, False, False)
    torch.testing.assert_close(torch.ops.cogsym.rotary(y, cos, sin, False, True), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_pair(cpu_backend: str, dtype: torch.dtype, value: float) -> None:
    x = torch.randn(1, 2, 3, 40).to(dtype)
    x[0, 1, 2, 3] = value
    y = rotary(x, *(torch.full((1, 2, 20), t) for t in (0.5, 0.25)))
    bad = ~y.isfinite()
    assert bad.nonzero().tolist() == [[0, 1, 2, 3], [0, 1, 2, 23]]
    assert torch.equal(y[bad].isnan(), torch.full((2,), value != value))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_nothing_to_turn(best_backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = rotary(x, *angles(1, shape[1], 8))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("interleaved", [False, True])
def test_result_depends_on_neither_run_nor_threads_nor_other_rows(cpu_backend: str, interleaved: bool) -> None:
    x = torch.randn(3, 67, 9, 66).bfloat16()
    cos, sin = angles(3, 67, 66)
    first = rotary(x, cos, sin, interleaved=interleaved)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(first, rotary(x, cos, sin, interleaved=interleaved))
    finally:
        torch.set_num_threads(threads)
    part = rotary(x[1:2, 5:6], cos[1:2, 5:6], sin[1:2, 5:6], interleaved=interleaved)
    assert torch.equal(part, first[1:2, 5:6])


def test_gradcheck(cpu_backend: str) -> None:
    x = torch.randn(2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(2, 3, 4)
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: rotary(x, cos, sin, interleaved=i), x)
        assert torch.autograd.gradgradcheck(lambda x, i=interleaved: rotary(x, cos, sin, interleaved=i), x)


def test_opcheck(best_backend: str) -> None:
    cos, sin = angles(1, 3, 6)
    for x in (torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3, 8).transpose(1, 2), torch.randn(2, 4, 8, 3).movedim(-1, 1)):
        x = x.detach().requires_grad_()
        for interleaved, inverse in ((False, False), (True, True)):
            torch.library.opcheck(torch.ops.cogsym.rotary.default, (x, cos, sin, interleaved, inverse))


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((2, 3, 8), (1, 3, 4), (1, 3, 4), r"x has shape \(2, 3, 8\), expected \[B, T, H, D\]"),
        ((2, 3, 1, 8), (1, 3, 4), (1, 3, 2), r"cos has shape \(1, 3, 4\) and sin \(1, 3, 2\)"),
        ((2, 3, 1, 8), (3, 3, 4), (3, 3, 4), r"expected both \[2 or 1, 3, R/2\]"),
        ((2, 3, 1, 8), (2, 4, 4), (2, 4, 4), r"expected both \[2 or 1, 3, R/2\]"),
        ((2, 3, 1, 8), (3, 4), (3, 4), r"expected both \[2 or 1, 3, R/2\]"),
        ((2, 3, 1, 7), (1, 3, 4), (1, 3, 4), r"cos has 4 columns, expected at most 3"),
    ],
)
def test_shapes_that_do_not_fit(x: tuple, cos: tuple, sin: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(torch.ones(x), torch.ones(cos), torch.ones(sin))


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_for_cos_or_sin_is_refused(which: int) -> None:
    tables = [torch.ones(1, 3, 4).requires_grad_(i == which) for i in (0, 1)]
    with pytest.raises(ValueError, match="cos or sin requires a gradient"):
        rotary(torch.ones(1, 3, 2, 8), *tables)
