"""Does every kernel and block compute the right thing here? Held against float64 on the same device.

An operation is right where its error is at most twice that of PyTorch's own way at the same precision; a block where
that holds beside transformers' layers. Errors are norms of the difference over the norm of the truth, of each output
and gradient.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cogsym
from cogsym.bench.case import Case, CaseSpec, Line, Setting, difference, dtype_name, error_line
from cogsym.bench.models import build, shape_of
from cogsym.bench.ops import LENGTH, examples, forced_backend, results
from cogsym.bench.report import Table
from cogsym.bench.study import Study
from cogsym.training.autograd import KEEPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALLOWED = 2.0  # times PyTorch's own error
LAST_BIT = 1.0  # and of one rounding, as an error of PyTorch's can be 0 by chance


Errors = dict[str, tuple[float, float]]  # ours and PyTorch's, of each output and gradient


def cases(setting: Setting) -> list[CaseSpec]:
    """Each operation and block, model and dtype."""
    found = []
    for model in setting.models:
        for dtype in DTYPES:
            checks: dict[str, Callable[[], Errors]] = {
                name: partial(operation, name, model, dtype, setting.device) for name in examples()
            }
            for keep in KEEPS:
                if keep != "offload" or setting.device.type == "cuda":
                    checks[f"layers, keep {keep}"] = partial(layers, model, keep, dtype, setting.device)
            title = f"{shape_of(model).name}, {dtype_name(dtype)}"
            found += [
                CaseSpec(f"{title}: {name}", partial(check, errors, torch.finfo(dtype).eps))
                for name, errors in checks.items()
            ]
    return found


def check(compute: Callable[[], Errors], eps: float) -> Case:
    """The verdict on one of them; nothing is timed."""
    try:
        errors = compute()
    except (RuntimeError, NotImplementedError) as error:
        return Case(facts={"right": False, "reason": error_line(error)})
    least = LAST_BIT * eps
    worst = max(errors, key=lambda n: errors[n][0] / (errors[n][1] + least))
    right = all(ours <= ALLOWED * theirs + least for ours, theirs in errors.values())
    facts = {"right": right, "worst": worst, "error": errors[worst][0], "error_of_pytorch": errors[worst][1]}
    return Case(facts=facts)


def operation(name: str, model: str, dtype: torch.dtype, device: torch.device) -> Errors:
    """(our error, PyTorch's) of each output and gradient."""
    torch.manual_seed(0)
    small = examples()[name](shape_of(model).sizes(1, LENGTH), dtype, device)
    exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in small.inputs.items()}
    doubles = dataclasses.replace(small, inputs=exact)
    ours, dout = results(small, small.ours)
    with forced_backend("reference"):
        truth, _ = results(doubles, doubles.ours, tuple(d.double() for d in dout))
    theirs, _ = results(small, small.plain, dout)
    names = [f"output {i}" for i in range(len(dout))] + [f"gradient of {n}" for n in small.differentiated]
    return _errors(names, ours, theirs, truth)


def layers(model: str, keep: str, dtype: torch.dtype, device: torch.device) -> Errors:
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


def _errors(names: list[str], ours: list[Tensor], theirs: list[Tensor], truth: list[Tensor]) -> Errors:
    return {
        n: (difference([a], [t]), difference([b], [t])) for n, a, b, t in zip(names, ours, theirs, truth, strict=True)
    }


def table(lines: list[Line]) -> Table:
    """The worst error of each."""
    rows = []
    for line in lines:
        facts = line["facts"]
        errors = [f"{facts[name]:.1e}" if name in facts else "" for name in ("error", "error_of_pytorch")]
        rows.append([line["name"], "yes" if facts["right"] else "NO", facts.get("worst", facts.get("reason")), *errors])
    return ["", "right", "worst", "error", "PyTorch's"], rows


STUDY = Study("parity", cases, table)
