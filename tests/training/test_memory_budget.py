"""What frozen layers may hold: a budget bounds it, more of it never repeats more, and the process keeps to it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, tiny_model
from torch import Tensor

import cogsym
from cogsym.bench.method import saved_bytes
from cogsym.models import read_block
from cogsym.training import keep as keeping
from cogsym.training.autograd import _Run
from cogsym.training.keep import choose, cost, inputs_at_once, most_held, run_flops


@pytest.mark.parametrize("trained", [(), (1, 3, 5, 7)])
def test_a_larger_budget_never_keeps_less_nor_repeats_more(trained: tuple[int, ...]) -> None:
    """And what is held is within it, wherever any choice is; counted of layers with trained ones between, too."""
    layers = tiny_model("llama", num_hidden_layers=12).model.layers
    blocks = {i: read_block(layer) for i, layer in enumerate(layers) if i not in trained}
    T, B = 16, 2
    inputs = {i: B * T * cost(block, "input", T, 4).bytes_per_token for i, block in blocks.items()}
    least = min(most_held(inputs, sorted(blocks)[:n]) for n in range(1, len(blocks) + 1))
    before = (0, math.inf)
    for budget in range(1, 12 * B * T * cost(blocks[0], "all", T, 4).bytes_per_token + 4000, 3989):
        keeps = choose(blocks, B * T, T, 4, budget)
        nothing = [i for i, keep in keeps.items() if keep == "nothing"]
        costs = [cost(blocks[i], keep, T, 4, first_of_run=i - 1 not in nothing) for i, keep in keeps.items()]
        kept, repeated = B * T * sum(c.bytes_per_token for c in costs), B * sum(c.repeated for c in costs)
        run: list[int] = []
        for i in (*nothing, -1):
            if run and i != run[-1] + 1:
                repeated += B * run_flops([blocks[j] for j in run], T)
                run = []
            run.append(i)
        assert max(kept, most_held(inputs, nothing) if nothing else 0) <= max(budget, least)
        assert kept >= before[0] and repeated <= before[1], budget
        before = kept, repeated
    assert before == (B * T * sum(cost(block, "all", T, 4).bytes_per_token for block in blocks.values()), 0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 11, 30])
def test_a_run_that_keeps_nothing_holds_as_many_inputs_as_are_counted(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's, those that wait, and the one that is asked for."""
    held, find = [], _Run.input

    def watched(self: Any, i: int) -> Tensor:
        x = find(self, i)
        held.append(1 + len(self._inputs) + (i > 0))
        return x

    monkeypatch.setattr(_Run, "input", watched)
    model = tiny_model("llama", num_hidden_layers=n + 1)
    cogsym.prepare(model, cogsym.LayerPlan.first(n + 1, 1), keep="nothing").train()
    model(**batch("plain"), use_cache=False).loss.backward()
    assert len(held) == n and max(held) == inputs_at_once(n) <= 2 * math.isqrt(max(n - 1, 0)) + 3


def test_what_gradients_and_an_optimizer_will_take_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's two states a parameter until a batch was seen, and gradients wherever they are not there."""
    budgets: list[int] = []
    monkeypatch.setattr(keeping, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(keeping, "choose", lambda *args, **_: budgets.append(args[4]) or {})
    model = cogsym.prepare(tiny_model("llama"), cogsym.LayerPlan.outer(4)).train()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for length in (17, 16, 15):
        model(**{name: x[:, :length] for name, x in batch("plain").items()}, use_cache=False).loss.backward()
        if length == 16:
            model.zero_grad()
    assert budgets == [(10**9 - 3 * trained) // 2, 10**9 // 2, (10**9 - trained) // 2]


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_trained_embeddings_make_the_stream_float32_and_that_is_counted(variant: str) -> None:
    """Under autocast, where the products stay bfloat16: by `explain`, and by what a step saves."""
    model = tiny_model(variant, torch.bfloat16)
    plan = cogsym.LayerPlan.outer(4, front=1, back=1, embeddings=True, head=model.config.tie_word_embeddings)
    ids = torch.randint(0, 61, (2, 16))
    held, told = {}, {}
    for keep in ("all", "attention", "input"):
        cogsym.prepare(model, plan, keep=keep).train()
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        parameters = [*model.parameters(), *model.buffers()]
        with torch.autocast("cpu", torch.bfloat16):
            held[keep] = saved_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, parameters)
        told[keep] = [layer.bytes_per_token for layer in cogsym.explain(model).layers]
    width = model.config.hidden_size
    assert told["input"] == [0, 4 * width, 4 * width, 0]
    for keep in ("all", "attention"):
        assert held[keep] - held["input"] == ids.numel() * (sum(told[keep]) - sum(told["input"]))


STEPS = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from tiny_models import tiny_model
import cogsym

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text("utf-8"))[1]) / 1024

for budget in (1, 60 << 20, 1 << 40):
    model = tiny_model("llama", num_hidden_layers=10, hidden_size=384, intermediate_size=1024).train()
    cogsym.prepare(model, cogsym.LayerPlan.first(10, 1), memory_budget=budget)
    ids = torch.randint(0, 61, (4, 256))
    for _ in range(2):  # the first time, pages of libraries come too
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = status("VmRSS")
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_the_process_keeps_to_its_budget() -> None:
    """A step takes at most the budget more than one with none, and less than one that keeps everything.

    In a process of its own, whose C library gives each tensor's memory back when it is freed.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEPS, str(Path(__file__).parents[1])]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    none, some, everything = (float(word) for word in child.stdout.split())
    assert some < none + 60 and some + 30 < everything
