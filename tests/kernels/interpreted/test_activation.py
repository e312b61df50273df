from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cogsym.ops
from cogsym.kernels import activation as launch
from cogsym.ops import operations
from cogsym.ops.activation import (
    ACTIVATIONS,
    gated_activation_backward_reference,
    gated_activation_reference,
)

Random = Callable[..., Tensor]
Check = Callable[..., None]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@activations
@pytest.mark.parametrize("F", [1, 7, 64, 96, 576, 1027])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_values(
    activation: str, F: int, dtype: torch.dtype, strided: bool, random: Random, assert_no_worse: Check
) -> None:
    gate, up = (3 * random(3, 2, 2 * F)).to(dtype).chunk(2, -1)
    dz = random(3, 2, F, dtype=dtype)
    if not strided:
        gate, up = gate.contiguous(), up.contiguous()
    double = [t.double() for t in (dz, gate, up)]
    plain = gated_activation_reference(gate, up, activation)
    z = launch.gated_activation(gate, up, activation)
    assert_no_worse(z, plain, gated_activation_reference(*double[1:], activation))
    plain = gated_activation_backward_reference(dz, gate, up, activation, True, True)
    truth = gated_activation_backward_reference(*double, activation, True, True)
    both = launch.gated_activation_backward(dz, gate, up, activation, True, True)
    assert_no_worse(both, plain, truth)
    # Each alone has the same bits, and what was not asked for is not there.
    for needs in ((True, False), (False, True), (False, False)):
        alone = launch.gated_activation_backward(dz, gate, up, activation, *needs)
        wanted = [half for half, needed in zip(both.chunk(2, -1), needs, strict=True) if needed]
        assert torch.equal(alone, torch.cat([both[..., :0], *wanted], -1))


@activations
@pytest.mark.parametrize("gated", [True, False])
def test_float64(activation: str, gated: bool, random: Random) -> None:
    """The reference is no truer than the kernel here: its 1 + tanh cancels."""
    dz, gate, up = (random(5, 96, dtype=torch.float64) for _ in range(3))
    up = up if gated else None
    torch.testing.assert_close(
        (
            launch.gated_activation(gate, up, activation),
            launch.gated_activation_backward(dz, gate, up, activation, True, gated),
        ),
        (
            gated_activation_reference(gate, up, activation),
            gated_activation_backward_reference(dz, gate, up, activation, True, gated),
        ),
        rtol=1e-13,
        atol=1e-13,
    )


LAYOUTS = {
    "experts of a fused product": lambda t: torch.cat((t, t), 2)[:, :, : t.shape[2]],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "last dimension strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "broadcast": lambda t: t[:1, :1, :1].expand_as(t),
}


@activations
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(activation: str, layout: str, random: Random) -> None:
    laid = [LAYOUTS[layout](random(2, 3, 2, 7)) for _ in range(3)]
    plain = [t.contiguous() for t in laid]
    z = launch.gated_activation(*plain[1:], activation)
    gradients = launch.gated_activation_backward(*plain, activation, True, True)
    for which in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        dz, gate, up = (one if w else other for one, other, w in zip(laid, plain, which, strict=True))
        got = launch.gated_activation_backward(dz, gate, up, activation, True, True)
        for one, other in zip((launch.gated_activation(gate, up, activation), got), (z, gradients), strict=True):
            assert one.is_contiguous()
            assert torch.equal(one, other)


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_without_a_gate(
    activation: str, dtype: torch.dtype, strided: bool, random: Random, assert_no_worse: Check
) -> None:
    x, dz = (3 * random(3, 200)).to(dtype)[:, : 100 if strided else None], random(3, 200, dtype=dtype)
    dz = dz[:, : x.shape[1]]
    truth = gated_activation_reference(x.double(), None, activation)
    z = launch.gated_activation(x, None, activation)
    assert_no_worse(z, gated_activation_reference(x, None, activation), truth)
    dx = launch.gated_activation_backward(dz, x, None, activation, True, False)
    plain = gated_activation_backward_reference(dz, x, None, activation, True, False)
    truth = gated_activation_backward_reference(dz.double(), x.double(), None, activation, True, False)
    assert_no_worse(dx, plain, truth)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_gates_do_not_overflow(activation: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([-3e38, -1e20, -1e5, -1e3, 0.0, 1e3, 1e5, 1e20, 3e38], dtype=dtype)
    one = torch.ones_like(gate)
    step = (gate > 0).to(dtype)
    assert torch.equal(launch.gated_activation(gate, one, activation), gate * step)
    dgate, dup = launch.gated_activation_backward(one, gate, one, activation, True, True).chunk(2, -1)
    assert torch.equal(dgate, torch.where(gate == 0, 0.5, step))
    assert torch.equal(dup, gate * step)


@activations
def test_nan_stays_where_it_is(activation: str, random: Random) -> None:
    dz, gate, up = random(3, 7), random(3, 7), random(3, 7)
    dz[0, 1] = gate[1, 2] = up[2, 3] = torch.nan
    assert torch.equal(launch.gated_activation(gate, up, activation).isnan(), gate.isnan() | up.isnan())
    dgate, dup = launch.gated_activation_backward(dz, gate, up, activation, True, True).chunk(2, -1)
    assert torch.equal(dgate.isnan(), dz.isnan() | gate.isnan() | up.isnan())
    assert torch.equal(dup.isnan(), dz.isnan() | gate.isnan())


@activations
@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_no_elements(activation: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert launch.gated_activation(x, x, activation).shape == shape
    assert launch.gated_activation_backward(x, x, x, activation, True, True).shape == (*shape[:-1], 2 * shape[-1])


def test_public_operation_launches_the_kernels() -> None:
    for name in ("gated_activation", "gated_activation_backward"):
        assert operations()[name].implementation(torch.zeros(1)) is getattr(launch, name)


@activations
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_public_gradients_by_finite_differences(activation: str, needs: tuple[bool, bool], random: Random) -> None:
    gate, up = (random(2, 3, dtype=torch.float64).requires_grad_(need) for need in needs)
    assert torch.autograd.gradcheck(lambda g, u: cogsym.ops.gated_activation(g, u, activation), (gate, up))
