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
from cogsym.ops import AttentionOptions, attention
from cogsym.ops.operation import Example, MakeExample, Sizes
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
                name: partial(operation, name, model, dtype, setting.device) for name in examples() | variations()
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
    except Exception as error:  # Triton's are of kinds of their own
        return Case(facts={"right": False, "reason": error_line(error)})
    least = LAST_BIT * eps
    worst = max(errors, key=lambda n: errors[n][0] / (errors[n][1] + least))
    right = all(ours <= ALLOWED * theirs + least for ours, theirs in errors.values())
    facts = {"right": right, "worst": worst, "error": errors[worst][0], "error_of_pytorch": errors[worst][1]}
    return Case(facts=facts)


def operation(name: str, model: str, dtype: torch.dtype, device: torch.device) -> Errors:
    """(our error, PyTorch's) of each output and gradient."""
    torch.manual_seed(0)
    small = (examples() | variations())[name](shape_of(model).sizes(1, LENGTH), dtype, device)
    exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in small.inputs.items()}
    doubles = dataclasses.replace(small, inputs=exact)
    ours, dout = results(small, small.ours)
    with forced_backend("reference"):
        truth, _ = results(doubles, doubles.ours, tuple(d.double() for d in dout))
    theirs, _ = results(small, small.plain, dout)
    names = [f"output {i}" for i in range(len(dout))] + [f"gradient of {n}" for n in small.differentiated]
    return _errors(names, ours, theirs, truth)


def variations() -> dict[str, MakeExample]:
    """What the examples of operations leave out, and kernels have code of its own for."""

    def with_gradients(name: str, *differentiated: str) -> dict[str, MakeExample]:
        if name not in examples():
            return {}

        def make(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
            return dataclasses.replace(examples()[name](sizes, dtype, device), differentiated=differentiated)

        return {f"{name}, trained": make}

    return {
        **with_gradients("rms_norm", "x", "residual", "weight"),
        **with_gradients("linear_cross_entropy", "hidden", "weight"),
        **({"attention, packed, window, soft cap, sinks": masked_attention} if "attention" in examples() else {}),
    }


def masked_attention(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    """Attention with all of its options, beside transformers' eager way."""
    example = examples()["attention"](sizes, dtype, device)
    T, H, scale, soft_cap = sizes.length, sizes.heads, sizes.head_dim**-0.5, 20.0
    place, window = torch.arange(T, device=device), max(1, T // 3)
    starts = (place // max(1, T // 2 + 3) * (T // 2 + 3))[None].expand(sizes.rows, T).to(torch.int32)
    seen = (place >= starts[0, :, None]) & (place <= place[:, None]) & (place > place[:, None] - window)

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return (attention(q, k, v, AttentionOptions(scale, starts, window, soft_cap, sinks))[0],)

    def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(1, 2).repeat_interleave(H // t.shape[2], 1) for t in (q, k, v))
        logits = torch.tanh(q @ k.mT * scale / soft_cap) * soft_cap
        logits = logits.masked_fill(~seen, torch.finfo(dtype).min)
        logits = torch.cat((logits, sinks.view(1, H, 1, 1).expand(*logits.shape[:-1], 1)), -1)
        return ((logits.softmax(-1, torch.float32)[..., :-1].to(dtype) @ v).transpose(1, 2),)

    inputs = example.inputs | {"sinks": torch.randn(H, device=device).to(dtype)}
    return dataclasses.replace(
        example, inputs=inputs, ours=ours, plain=plain, differentiated=(*example.differentiated, "sinks")
    )


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
