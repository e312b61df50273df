from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import rotary as launch
from cogsym.ops import operations
from cogsym.ops.rotary import rotary_reference

Random = Callable[..., Tensor]
Check = Callable[..., None]
# D and the number of pairs: whole, odd, partial, hardly any, none
HEADS = ((64, 32), (96, 48), (7, 3), (1, 0), (64, 8), (80, 1), (576, 288))
interleaved = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def make_angles(random: Random, B: int, T: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = 3 * random(B, T, half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@interleaved
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("D", "half"), HEADS)
@pytest.mark.parametrize(
    ("dtype", "angle_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_values(
    interleaved: bool,
    inverse: bool,
    D: int,
    half: int,
    dtype: torch.dtype,
    angle_dtype: torch.dtype,
    random: Random,
    assert_no_worse: Check,
) -> None:
    x = random(2, 5, 3, D, dtype=dtype)
    cos, sin = make_angles(random, 2, 5, half, angle_dtype)
    plain = rotary_reference(x, cos, sin, interleaved, inverse)
    truth = rotary_reference(x.double(), cos.double(), sin.double(), interleaved, inverse)
    got = launch.rotary(x, cos, sin, interleaved, inverse)
    assert_no_worse(got, plain, truth)
    assert torch.equal(got[..., 2 * half :], x[..., 2 * half :])


@interleaved
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1, 1), (3, 70, 1), (1, 2, 19), (40, 1, 9)])
def test_every_token_and_head_is_reached(
    interleaved: bool, B: int, T: int, H: int, random: Random, assert_no_worse: Check
) -> None:
    x = random(B, T, H, 64)
    cos, sin = make_angles(random, 1, T, 32, torch.float32)
    truth = rotary_reference(x.double(), cos.double(), sin.double(), interleaved, False)
    assert_no_worse(
        launch.rotary(x, cos, sin, interleaved, False), rotary_reference(x, cos, sin, interleaved, False), truth
    )


LAYOUTS = {
    "heads of a fused projection": lambda t: torch.cat((t, t), 2)[:, :, : t.shape[2]],
    "heads before positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a head": lambda t: torch.cat((t, t), 3)[..., : t.shape[3]],
    "last dimension strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "positions first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@interleaved
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(interleaved: bool, layout: str, random: Random) -> None:
    x = random(2, 5, 3, 96)
    cos, sin = make_angles(random, 2, 5, 32, torch.float32)
    lay = LAYOUTS[layout]
    assert not lay(x).is_contiguous()
    assert torch.equal(lay(x), x)
    # Angles as transformers makes them: both halves of the last dimension, of which one is taken.
    wide_cos, wide_sin = torch.cat((cos, cos), -1)[..., :32], sin.repeat_interleave(2, -1)[..., ::2]
    got = launch.rotary(lay(x), wide_cos, wide_sin, interleaved, False)
    assert got.is_contiguous()
    assert torch.equal(got, launch.rotary(x, cos, sin, interleaved, False))


@interleaved
def test_angles_are_shared_along_the_batch(interleaved: bool, random: Random) -> None:
    x = random(3, 5, 2, 64)
    cos, sin = make_angles(random, 1, 5, 32, torch.float32)
    got = launch.rotary(x, cos, sin, interleaved, False)
    assert torch.equal(got, launch.rotary(x, cos.expand(3, 5, 32), sin.repeat(3, 1, 1), interleaved, False))


@interleaved
def test_nan_stays_in_its_pair(interleaved: bool, random: Random) -> None:
    x = random(1, 3, 2, 16)
    cos, sin = make_angles(random, 1, 3, 6, torch.float32)
    x[0, 1, 1, 2] = x[0, 2, 0, 14] = torch.nan
    expected = x.isnan()
    expected[0, 1, 1, 3 if interleaved else 8] = True
    assert torch.equal(launch.rotary(x, cos, sin, interleaved, False).isnan(), expected)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    angles = torch.zeros(1, shape[1], 4)
    assert launch.rotary(torch.zeros(shape), angles, angles, False, False).shape == shape


@interleaved
def test_public_operation(interleaved: bool, random: Random) -> None:
    assert operations()["rotary"].implementation(torch.zeros(1)) is launch.rotary
    x = random(1, 2, 1, 7, dtype=torch.float64).requires_grad_()
    cos, sin = make_angles(random, 1, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cogsym.ops.rotary(x, cos, sin, interleaved=interleaved), (x,))
