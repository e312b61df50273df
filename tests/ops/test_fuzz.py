"""Fuzz: the error of every operation, outputs and each gradient, as a ratio to plain PyTorch's at the same precision.

Of a few draws of one case, in the same magnitudes, the largest error of a tensor is compared:

    ratio = max |ours - float64| / max(max |plain - float64|, floor)
    floor = eps · max |float64| + eps_sums · max Σ |terms|

eps is that of the inputs' dtype, eps_sums that of what is computed in (float32, and float64 for float64), and terms
are what the value is a sum of. Three are taken for larger, for what is rounded to float32 on the way in PyTorch and
here: in attention each 1 + |logit| times, as e^x makes a relative error of the absolute one of a logit and of its
logsumexp; at the head likewise, by the magnitude of what the logit sums up; in layer norm 1 + |h| / deviation times,
for the mean. Below the floor plain PyTorch counts as exact, or lucky. At most 2 is allowed: twice PyTorch's error, or
twice the floor.

    python -m pytest tests/ops/test_fuzz.py --fuzz-examples 2000        as long as you like; prints the worst ratios

docs/rounding.md has the table of a long run. An operation that is registered without a strategy in `fuzz_cases.py`
fails here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogsym.ops import backend, logit_blocks, operations

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ISAS
from fuzz_case import Case, Tensors
from fuzz_cases import STRATEGIES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 8  # examples where no other number is asked for
ENOUGH, MOST = 256, 12  # values of a tensor from which its largest error is no matter of luck; draws of a case at most


def test_every_operation_has_a_strategy() -> None:
    assert STRATEGIES.keys() == {name for name, operation in operations().items() if operation.part_of is None}


def results(case: Case, compute: Any, tensors: Tensors, **more: Any) -> Tensors:
    """Outputs and gradients, for the gradients that `tensors` has of the outputs."""
    given = {name: x.detach() for name, x in tensors.items() if name[1:] not in case.outputs}
    for name in case.differentiated:
        given[name].requires_grad_()
    outputs = compute(**given, **more)
    found = {name: x.detach() for name, x in zip(case.outputs, outputs, strict=True)}
    if case.differentiated:
        differentiable = [
            (x, tensors["d" + o].to(x.dtype)) for o, x in zip(case.outputs, outputs, strict=True) if x.requires_grad
        ]
        xs, douts = zip(*differentiable, strict=True)
        grads = torch.autograd.grad(xs, [given[name] for name in case.differentiated], douts)
        found |= {"d" + name: grad for name, grad in zip(case.differentiated, grads, strict=True)}
    return found


def ratios(case: Case, dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    """By result: the ratio, our largest error and PyTorch's."""
    worst: dict[str, list[float]] = {}
    for count in range(1, MOST + 1):
        tensors = {name: x.to(dtype) for name, x in case.draw().items()}
        doubles = {name: x.double() for name, x in tensors.items()}
        exact = results(case, case.plain, doubles, stored=dtype)
        own, got = results(case, case.plain, tensors, stored=dtype), results(case, case.ours, tensors)
        terms = {**exact, **case.terms(doubles, exact)}
        for name, truth in exact.items():
            assert got[name].shape == truth.shape, name
            kept = truth.to(dtype).isfinite()  # a norm of next to nothing may leave float16
            assert got[name][kept].isfinite().all(), name
            if not kept.any():
                continue
            info = torch.finfo(dtype)
            numbers = [(t.double() - truth)[kept].abs().amax().item() for t in (got[name], own[name])]
            numbers += [
                truth[kept].abs().amax().item() * info.eps + info.tiny * info.eps,
                terms[name].abs().max().item(),
            ]
            worst[name] = [max(pair) for pair in zip(numbers, worst.get(name, [0.0] * 4), strict=True)]
        if min(t.numel() for t in exact.values()) * count >= ENOUGH:
            break
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return {name: (ours / max(own, floor + sums * size), ours, own) for name, (ours, own, floor, size) in worst.items()}


@pytest.mark.skipif(not ISAS, reason=f"no C++ extension: {backend.unavailable('cpp')}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", STRATEGIES)
def test_error_is_at_most_twice_pytorchs(
    name: str, dtype: torch.dtype, pytestconfig: pytest.Config, record_ratio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogsym import _C

    examples = pytestconfig.getoption("--fuzz-examples")

    monkeypatch.setenv("COGSYM_BACKEND", "cpp")
    before, blocks = _C.isa(), dict(logit_blocks.BLOCKS)
    met: set[str] = set()
    implementation = backend.Kernel.implementation

    def recording(self: backend.Kernel, *args: Any) -> Any:
        met.add(self.name)
        return implementation(self, *args)

    monkeypatch.setattr(backend.Kernel, "implementation", recording)

    @settings(
        max_examples=examples or FEW,
        derandomize=examples is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[name], st.sampled_from(ISAS), st.integers(0, 2**31))
    def check(case: Case, isa: str, values: int) -> None:
        torch.manual_seed(values)
        _C.set_isa(isa)
        logit_blocks.BLOCKS["cpu"] = case.blocks or blocks["cpu"]
        found = ratios(case, dtype)
        for what, (ratio, ours, own) in found.items():
            record_ratio(name, what, dtype, ratio)
            assert ratio <= 2, f"{what}, {isa}: largest error {ours:.3g}, PyTorch's {own:.3g}, ratio {ratio:.2f}"

    try:
        check()
    finally:
        _C.set_isa(before)
        logit_blocks.BLOCKS.update(blocks)
    parts = {part for part, operation in operations().items() if operation.part_of == name}
    assert met >= {name, *parts}, "no example meets some operation: give it a strategy, or more examples"
