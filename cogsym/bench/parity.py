"""Does every kernel and block compute the right thing here? Held against float64 on the same device.

An operation is right where its error is at most twice that of PyTorch's own way at the same precision; a block where
that holds beside transformers' layers. Errors are norms of the difference over the norm of the truth, of each output
and gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import cogsym
from cogsym.bench.case import difference, dtype_name, one_line
from cogsym.bench.models import build, shape_of
from cogsym.bench.ops import LENGTH, OPERATIONS, Operation, forced_backend
from cogsym.training.autograd import KEEPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALLOWED = 2.0  # times PyTorch's own error
LAST_BIT = 1.0  # and of one rounding, as an error of PyTorch's can be 0 by chance


def check(models: tuple[str, ...], device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for each operation and block, model and dtype: errors, and "right"."""
    for model in models:
        for dtype in DTYPES:
            for name in OPERATIONS:
                yield _line(name, model, dtype, lambda: operation(name, model, dtype, device))  # noqa: B023
            for keep in KEEPS:
                if keep != "offload" or device.type == "cuda":
                    yield _line(f"layers, keep {keep}", model, dtype, lambda: layers(model, keep, dtype, device))  # noqa: B023


def _line(name: str, model: str, dtype: torch.dtype, errors: Any) -> dict[str, Any]:
    line: dict[str, Any] = {"what": name, "model": model, "dtype": dtype_name(dtype)}
    try:
        found = errors()
    except (RuntimeError, NotImplementedError) as error:
        return line | {"right": False, "reason": one_line(error)}
    least = LAST_BIT * torch.finfo(dtype).eps
    worst = max(found, key=lambda n: found[n][0] / (found[n][1] + least))
    right = all(ours <= ALLOWED * theirs + least for ours, theirs in found.values())
    return line | {"right": right, "worst": worst, "error": found[worst][0], "error_of_pytorch": found[worst][1]}


def operation(name: str, model: str, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, float]]:
    """(our error, PyTorch's) of each output and gradient."""
    torch.manual_seed(0)
    small = OPERATIONS[name][0](shape_of(model), 1, dtype, device)
    exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in small.inputs.items()}
    doubles = Operation(exact, small.ours, small.plain, small.differentiated, small.unit, small.work)
    ours, dout = small.results(small.ours)
    with forced_backend("reference"):
        truth, _ = doubles.results(doubles.ours, tuple(d.double() for d in dout))
    theirs, _ = small.results(small.plain, dout)
    names = [f"output {i}" for i in range(len(dout))] + [f"gradient of {n}" for n in small.differentiated]
    return _errors(names, ours, theirs, truth)


def layers(model: str, keep: str, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, float]]:
    """A trained layer and two frozen ones: (our error, transformers') of the output and of each gradient."""
    torch.manual_seed(0)
    plan = cogsym.LayerPlan.layers(3, [0])
    net = build(model, 3, dtype, device).model.train()
    for part in plan.parts(net):
        for p in part.parameters:
            p.requires_grad_(part.trained)
    x = torch.randn(1, min(LENGTH, 128), shape_of(model).width, device=device).to(dtype)
    dy = torch.randn_like(x)
    exact = copy.deepcopy(net).double()
    names, theirs = _pass(net, x, dy)
    _, truth = _pass(exact, x.double(), dy.double())
    del exact
    cogsym.prepare(net, plan, keep=keep)
    _, ours = _pass(net, x, dy)
    return _errors(names, ours, theirs, truth)


def _pass(net: Any, x: Tensor, dy: Tensor) -> tuple[list[str], list[Tensor]]:
    net.zero_grad()
    y = net(inputs_embeds=x, use_cache=False).last_hidden_state
    y.backward(dy)
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return ["output", *gradients], [y.detach(), *gradients.values()]


def _errors(
    names: list[str], ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor]
) -> dict[str, tuple[float, float]]:
    return {
        n: (difference([a], [t]), difference([b], [t])) for n, a, b, t in zip(names, ours, theirs, truth, strict=True)
    }
