"""What does not fit is refused at the door, by every way in: called, recorded for a gradient, registered, traced."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogsym import ops
from cogsym.ops import AttentionOptions, attention, attention_gradients, operations, rms_norm, rotary

sys.path.insert(0, str(Path(__file__).parent))
from recorded import calls

EXAMPLES = {name: operation for name, operation in operations().items() if operation.example}
ONE_SENTENCE = re.compile(r"\w+: [^\n]*expected [^\n]*\.$")


def made(name: str) -> list[tuple[ops.Operation, tuple[Any, ...]]]:
    """An operation and its gradients, with arguments that fit."""
    own = {operation.overload: operation for operation in operations().values()}
    return [(own[overload], args) for overload, args in calls(EXAMPLES[name])]


def changed(args: tuple[Any, ...], change: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[Any, ...]]:
    """The arguments with one tensor changed, each in turn."""
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and (other := change(x)) is not None:
            yield (*args[:i], other, *args[i + 1 :])


def ways(operation: ops.Operation) -> list[Callable[..., Any]]:
    """As a model calls it, recorded for a gradient, and by the registered form."""

    def recorded(*args: Any) -> Any:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return operation(*leaves)

    return [operation, recorded, operation.overload]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tensor_on_another_device(best_backend: str, name: str) -> None:
    for operation, args in made(name):
        for wrong in changed(args, lambda x: x.to("meta")):
            if all(not isinstance(a, Tensor) or a.is_meta for a in wrong):
                continue  # its only tensor
            for way in ways(operation):
                with pytest.raises(RuntimeError, match=r" is on (cpu|meta) and \w+ on (cpu|meta), expected one device"):
                    way(*wrong)


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "integers": lambda x: x.int() if x.is_floating_point() else None,
    "another floating-point dtype": lambda x: x.bfloat16() if x.is_floating_point() else None,
    "floating point for integers": lambda x: None if x.is_floating_point() else x.double(),
    "a longer last dimension": lambda x: torch.cat((x, x[..., :1]), -1) if x.dim() else None,
    "a shorter first dimension": lambda x: x[:-1] if x.dim() else None,
    "one dimension less": lambda x: x[0] if x.dim() else None,
    "no dimension": lambda x: x.flatten()[0],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tensor_that_does_not_fit(best_backend: str, name: str, change: str) -> None:
    """One sentence; or where it is allowed, as a weight of another dtype is, what the reference computes."""
    refused, cases = 0, made(name)  # none where PyTorch's own product stands in
    for operation, args in cases:
        for wrong in changed(args, CHANGES[change]):
            try:
                got = operation(*wrong)
            except (ValueError, TypeError, IndexError) as error:
                assert ONE_SENTENCE.match(str(error)), error
                refused += 1
                for way in ways(operation)[1:]:
                    with pytest.raises(type(error), match=re.escape(str(error))):
                        way(*wrong)
            else:
                assert "integers" not in change
                expected = operation.reference(*wrong)
                halves = any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in wrong)
                near = 2e-2 if operation.name.startswith("int8") and halves else 1e-5  # of two neighbours, either
                torch.testing.assert_close(got, expected, atol=near, rtol=near, msg=f"{operation.name}: {change}")
    assert refused or not cases or change in ("floating point for integers", "another floating-point dtype"), (
        "nothing was refused"
    )


def test_a_fake_tensor_that_does_not_fit() -> None:
    """A tracer hears it as a call does."""
    weight = torch.ones(5)
    compiled = torch.compile(lambda x: rms_norm(x, weight, 1e-6), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"weight has shape \(5,\), expected \(4,\) to match x"):
        compiled(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([[0, 0, 0], [0, 2, 2]], r"starts of query 1 in row 1 is 2, expected 0 to 1; a query sees itself\."),
        ([[0, 0, 0], [0, -1, 0]], r"starts of query 1 in row 1 is -1, expected 0 to 1"),
        ([[0, 1, 0], [0, 0, 0]], r"starts decrease along a row, expected them to stay or rise\."),
    ],
)
def test_starts_that_no_query_can_have(best_backend: str, starts: list[list[int]], message: str) -> None:
    q = torch.randn(2, 3, 2, 8)
    options = AttentionOptions(1.0, torch.tensor(starts, dtype=torch.int32))
    o, lse = attention(q, q, q, AttentionOptions(1.0))
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, options)
    with pytest.raises(ValueError, match=message):
        attention_gradients(q, q, q, q, o, lse, options)


def test_cos_and_sin_of_different_dtypes(best_backend: str) -> None:
    cos = torch.ones(1, 3, 4)
    with pytest.raises(TypeError, match=r"cos has dtype torch\.float32 and sin torch\.bfloat16, expected one\."):
        rotary(torch.ones(1, 3, 2, 8), cos, cos.bfloat16())


def test_weights_of_tokens_that_do_not_fit() -> None:
    given = torch.ones(2, 4), torch.ones(9, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"token_weights have shape \(3, 2\), expected one that broadcasts to \(2,\)"):
        ops.linear_cross_entropy(*given, token_weights=torch.ones(3, 2), reduction="none")
