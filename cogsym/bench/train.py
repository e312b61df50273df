"""How fast is a training step, and what does it hold? Ours beside every alternative, on the same weights and batch.

Two jobs: the outer quarter of the layers is trained, and LoRA adapters on those layers are. Frozen weights and the
computation are in the precision that is fastest here, bfloat16 by autocast or float32; trained weights are float32, as
`cogsym train` has them. A step is forward,
backward and AdamW. The floor is the matrix products of the linear maps and the head that no method can do without.
Before any timing each competitor's loss and gradients are compared with ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import cogsym
from cogsym.bench import floor, method, report
from cogsym.bench.case import QUICK_ROUNDS, ROUNDING, Case, CaseSpec, Line, Setting, difference, dtype_name, error_line
from cogsym.bench.competitor import Competitor
from cogsym.bench.models import build, shape_of
from cogsym.bench.study import Study
from cogsym.bench.trainers import COMPETITORS, Job, Loss
from cogsym.models import read_block

JOBS = ("outer layers", "LoRA on the outer layers")
LORA_RANK = 16
LENGTH = 512
QUICK_LAYERS = 8  # of a model in a quick run
STEPS = 150  # times the floor's seconds that all competitors together take with the least rounds, about


def cases(setting: Setting) -> list[CaseSpec]:
    """Both jobs for each model; the first in a quick run."""
    found = []
    for model in setting.models:
        shape = shape_of(model)
        layers = shape.layers if setting.full else setting.layers(min(QUICK_LAYERS, shape.layers))
        rows, length = setting.batch(4 if setting.device.type == "cuda" else 2, LENGTH)
        part = "" if layers == shape.layers else f"{layers} of {shape.layers} layers, "
        # Forward and input gradient of all, and the gradient of weights of a quarter.
        flops = 4 * rows * length * (layers * 1.125 * shape.layer_weights + shape.head_weights)
        for job in JOBS if setting.full else JOBS[:1]:
            title = f"{shape.name}, {part}{rows} x {length} tokens, {dtype_name(setting.dtype)}: {job}"
            build_case = partial(case, model, layers, rows, length, job, setting)
            rounds = method.LEAST_ROUNDS if setting.full else QUICK_ROUNDS
            found.append(CaseSpec(title, build_case, rounds=rounds, seconds=STEPS * flops / setting.rate))
    return found


def case(model: str, layers: int, rows: int, length: int, kind: str, setting: Setting) -> Case:
    """One job with all its competitors, verified."""
    job = make_job(model, layers, rows, length, kind != JOBS[0], setting.device, setting.dtype)
    trained = [p for p in job.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, fused=True)
    products = step_floor(job)
    result = Case(floor=products)
    result.facts = {
        "tokens": rows * length,
        "layers": layers,
        "trained_parameters": sum(p.numel() for p in trained),
        "flops_of_the_floor": products.flops,
    }
    agreeing: list[Competitor[Job, Loss]] = []
    truth: tuple[Tensor, list[Tensor]] | None = None
    # All before any takes a step, which changes the weights.
    for competitor in COMPETITORS if setting.alternatives else COMPETITORS[:1]:
        if reason := competitor.unavailable(setting.device, setting.full):
            result.skipped[competitor.name] = reason
            continue
        try:
            loss, gradients = loss_and_gradients(competitor, job, trained)
        except Exception as error:  # another library's: whatever it raises is its reason
            result.skipped[competitor.name] = error_line(error)
            continue
        if truth is None:
            truth = loss, gradients
        if reason := _disagreement(loss, gradients, *truth, ROUNDING[setting.dtype]):
            result.different[competitor.name] = reason
            continue
        agreeing.append(competitor)
        result.counts[competitor.name] = {"difference": difference(gradients, truth[1])}
    for competitor in agreeing:
        try:
            result.counts[competitor.name] |= _bytes(competitor, job, optimizer)
        except RuntimeError as error:  # a step with its optimizer needs more memory than its gradients did
            optimizer.zero_grad()
            result.skipped[competitor.name] = error_line(error)
            continue
        result.variants[competitor.name] = competitor.variant(job, partial(take_step, optimizer))
    return result


def make_job(
    model: str,
    layers: int,
    rows: int,
    length: int,
    adapters: bool,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    """A model frozen but for its outer quarter, or with adapters there, and a batch of rows of `length` tokens."""
    plan = cogsym.LayerPlan.outer(layers)
    net: Any = build(model, layers, dtype, device).train().requires_grad_(False)
    if adapters:
        from peft import LoraConfig, get_peft_model

        block = read_block(net.model.layers[0])
        names = [name for projections in block.projections() for name in projections.names]
        config = LoraConfig(r=LORA_RANK, target_modules=names, layers_to_transform=list(plan.trained))
        net = get_peft_model(net, config)
        for name, p in net.named_parameters():
            if "lora_B" in name:  # zero, which would make the gradients of lora_A zero
                torch.nn.init.normal_(p, std=0.02)
    else:
        for part in plan.parts(net):
            for p in part.parameters:
                p.requires_grad_(part.trained)
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    generator = torch.Generator(device).manual_seed(0)
    vocabulary = net.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (rows, length), generator=generator, device=device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return Job(net, plan, {"input_ids": ids, "labels": ids}, autocast, adapters)


def take_step(optimizer: torch.optim.Optimizer, loss: Loss) -> None:
    """Forward, backward, AdamW."""
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def _bytes(competitor: Competitor[Job, Loss], job: Job, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Bytes kept for the backward pass, a token's share, and the most that a step holds."""
    with competitor.applied(job) as loss:
        take_step(optimizer, loss)  # the optimizer's own state is there from now on
        kept = method.saved_bytes(loss, [*job.model.parameters(), *job.model.buffers()])
        peak = method.peak_bytes(partial(take_step, optimizer, loss), job.device)
    return {"kept_bytes_a_token": kept / job.inputs["input_ids"].numel(), "peak_bytes": peak}


def loss_and_gradients(competitor: Competitor[Job, Loss], job: Job, trained: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients that a competitor computes."""
    try:
        with competitor.applied(job) as compute_loss:
            loss = compute_loss()
            loss.backward()
        return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    finally:  # of one that fails halfway, too: what is there would be added to the next one's
        for p in trained:
            p.grad = None


def _disagreement(
    loss: Tensor, gradients: list[Tensor], true_loss: Tensor, true_gradients: list[Tensor], allowed: float
) -> str | None:
    """How a result is something else than ours, or None."""
    for what, distance in (
        ("its loss is", difference([loss], [true_loss])),
        ("its gradients are", difference(gradients, true_gradients)),
    ):
        if not distance <= allowed:
            return f"{what} {distance:.1e} away from ours"
    return None


def step_floor(job: Job) -> floor.Products:
    """The products of a step. Nothing below the lowest trained layer needs a gradient, and no adapter is counted."""
    rows = job.inputs["input_ids"].numel()
    products = floor.Products(job.model.get_input_embeddings().weight.dtype, job.device)
    base = job.model.get_base_model() if job.adapters else job.model
    lowest = min(job.plan.trained)
    for i, layer in enumerate(base.model.layers):
        products.add_block(
            read_block(layer),
            rows,
            input_gradient=i >= lowest,
            weight_gradient=i in job.plan.trained and not job.adapters,
            lowest=i == lowest and job.adapters,  # else its norm is trained, and needs the gradient
        )
    products.add_linear(rows, tuple(base.lm_head.weight.shape), input_gradient=True, weight_gradient=False)
    return products


def cells(line: Line, result: dict[str, Any]) -> dict[str, str]:
    """A variant in a table."""
    return {
        "ms a step": f"{result['seconds'] * 1e3:,.0f}",
        "tokens/s": f"{line['facts']['tokens'] / result['seconds']:,.0f}",
        "over the floor": f"{result['over_floor']['median']:.2f}",
        "time / cogsym": report.spread(result.get("over_cogsym")),
        "kept, B a token": f"{result['kept_bytes_a_token']:,.0f}",
        "peak, MB": f"{result['peak_bytes'] / 1e6:,.0f}",
    }


STUDY = Study("train", cases, report.by_variant(cells, first="job"))
