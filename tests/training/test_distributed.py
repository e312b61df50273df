"""Prepared models on two processes: the loss and the gradients are those of one process with the whole batch.

Two processes are started once for all cases. They find each other through a file, talk over the loopback device, give
up on a partner that does not answer, and are killed where they do not end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from served import TOLD
from tiny_models import batch, exact_float64, tiny_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import cogsym
from cogsym.models import Block

PLAN = cogsym.LayerPlan.outer(6, front=1, back=1)
KEEPS = ("all", "input", "nothing")
KINDS = ("ddp", "layers sharded", "model sharded", "sharded before")
LIMIT = timedelta(seconds=60)


def model() -> Any:
    return tiny_model("llama", torch.float64, num_hidden_layers=6).train()


def inputs() -> dict[str, Tensor]:
    """Two rows with as many labels each, so that the mean over the rows is the mean over the tokens."""
    return {name: t[:2] for name, t in batch("plain").items()}


def run(kind: str, keep: str, rows: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """One step of this process with its rows: what `explain` says, and the loss and gradients, whole and averaged."""
    it = model()
    if kind == "sharded before":
        for layer in it.model.layers:
            fully_shard(layer)
    wrapped = cogsym.prepare(it, PLAN, keep=keep)
    if kind == "layers sharded":
        for layer in it.model.layers:
            fully_shard(layer)
    if kind == "ddp":
        wrapped = DistributedDataParallel(it)
    else:
        fully_shard(it)
    loss = wrapped(**rows, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in it.named_parameters() if p.grad is not None}
    gradients = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return cogsym.explain(it), gradients | {"loss": mean}


def worker(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=LIMIT)
    by_hand, told, tensors = Counter[str](), {}, {}
    forward = Block.run

    def counted(*args: Any) -> Any:
        by_hand["forward"] += 1
        return forward(*args)

    with exact_float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "run", counted)
        for kind in KINDS:
            for keep in KEEPS:
                by_hand.clear()
                explanation, results = run(kind, keep, {n: t[rank : rank + 1] for n, t in inputs().items()})
                tensors |= {f"{kind}/{keep}/{n}": t for n, t in results.items()}
                told[f"{kind}/{keep}"] = [by_hand["forward"], str(explanation)]
    if rank == 0:
        save_file(tensors, folder / "results.safetensors")
        (folder / "told.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the first process, and for each case its count of forwards by hand and what `explain` says."""
    folder = tmp_path_factory.mktemp("distributed")
    paths = [str(Path(cogsym.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(2):
            command = [sys.executable, __file__, str(rank), str(folder)]
            log = (folder / f"log {rank}").open("w")
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        statuses = [process.wait(2 * LIMIT.total_seconds()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0, 0], "\n".join((folder / f"log {rank}").read_text()[-3000:] for rank in range(2))
    return load_file(folder / "results.safetensors"), json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    """transformers' own model in one process with both rows."""
    with exact_float64():  # the tables of positions too, which a model makes when it is made
        it = model()
        for part in PLAN.parts(it):
            for p in part.parameters:
                p.requires_grad_(part.trained)
        loss = it(**inputs(), use_cache=False).loss
        loss.backward()
    return {n: p.grad for n, p in it.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_one_process(kind: str, keep: str, results: Any, truth: Any) -> None:
    prefix = f"{kind}/{keep}/"
    got = {n.removeprefix(prefix): t for n, t in results[0].items() if n.startswith(prefix)}
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_run_by_hand_or_explain_says_why_not(kind: str, results: Any) -> None:
    forwards, told = zip(*(results[1][f"{kind}/{keep}"] for keep in KEEPS), strict=True)
    if kind == "sharded before":
        assert forwards == (0, 0, 0)
        assert all("layers 1-4: frozen, own forward (it was sharded before the model was" in text for text in told)
        return
    alone = kind == "layers sharded"  # in float64 the logarithms of sums are float64 too: 6 heads of 8 bytes
    # Four forwards each; a run of four that keeps nothing computes three inputs again, and the first of each segment.
    assert forwards == (4, 4, 4 if alone else 8)
    assert f"layers 1-4: frozen, {TOLD}, keeps all: 2,736 bytes a token, 0% repeated" in told[0]
    assert f"layers 1-4: frozen, {TOLD}, keeps input: 288 bytes a token" in told[1]
    if alone:
        assert f"layers 1-4: frozen, {TOLD}, keeps input (not nothing: it is sharded by itself): 288 bytes" in told[2]
    else:
        assert f"layers 2-4: frozen, {TOLD}, keeps nothing: 0 bytes a token" in told[2]


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
