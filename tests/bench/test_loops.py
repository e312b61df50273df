"""Sweeps beside loops: every loop computes what ours does, leaves no trace, and is not timed where it does not."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogsym.bench import generate, sampled, sweep
from cogsym.bench.case import OURS, Setting, measure
from cogsym.bench.competitor import Competitor
from cogsym.bench.loops import LOOPS, Loop, LoopOptions, Probe, likelihoods, texts
from cogsym.bench.models import build, shape_of
from cogsym.sweeps.engine.forward import Engine
from cogsym.sweeps.engine.requests import Generate
from cogsym.sweeps.engine.score import score
from cogsym.sweeps.engine.unembedding import SweepHead
from cogsym.sweeps.engine.weights import ResidentLayers
from cogsym.sweeps.layers.configurations import Configuration, configurations, distinct, grid
from cogsym.sweeps.layers.trie import Trie

CPU = torch.device("cpu")
FULL = Setting(("tiny",), CPU, full=True)
GRID = distinct(grid(shape_of("tiny").layers))[0]
DIRECTIONS = [c for c in distinct(configurations("input,output", 4))[0] if c.k < 4]
LAYERS = shape_of("tiny").layers
HERE = [c for c in LOOPS if c.needs is None or importlib.util.find_spec(c.needs)]


def tiny(dtype: torch.dtype = torch.float32) -> Probe:
    return Probe(build("tiny", None, dtype, CPU).eval())


def scores(chosen: list[Configuration] = GRID, dtype: torch.dtype = torch.float32) -> Any:
    return sweep.case("tiny", LAYERS, chosen, "choices", 2, dtype, FULL)


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a model repeats a prompt's last token whatever its layers say, unless they say it louder."""

    def louder(*args: Any) -> Any:
        model = build(*args)
        for layer in model.model.layers:
            for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                p.data *= 10
        return model

    monkeypatch.setattr(generate, "build", louder)


@pytest.mark.parametrize("make", [scores, lambda: generate.case("tiny", LAYERS, DIRECTIONS, 2, torch.float32, FULL)])
def test_every_loop_that_runs_here_agrees(make: Any) -> None:
    case = make()
    assert case.variants.keys() == {OURS, *(c.name for c in HERE)}
    assert not case.different
    line = measure(case, CPU, 1)
    scale = case.facts["configurations"] / case.facts["configurations_timed"]
    assert case.facts["configurations_timed"] == sampled.SAMPLE
    assert [v.scale for v in case.variants.values()] == [1.0, *[scale] * len(HERE)]
    assert all(line["variants"][c.name]["over_cogsym"]["median"] > 0 for c in HERE)


@pytest.mark.parametrize("competitor", HERE, ids=lambda c: c.name)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("all_logits", [False, True])
def test_a_loop_leaves_no_trace(competitor: Competitor[Probe, Loop], batch: int, all_logits: bool) -> None:
    probe, asked = tiny(), sweep.questions("passages", 3, 512)

    def state() -> list[Any]:
        modules = [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in probe.model.modules()]
        return [modules, probe.model.config.to_dict()]

    before, whole = state(), probe.model(torch.arange(9)[None], use_cache=False).logits
    with competitor.applied(probe) as loop:
        settings = LoopOptions("eager", batch, all_logits)
        likelihoods(loop, Configuration.of(4, {"skip": [0, 3]}), settings, asked, CPU)
    assert state() == before
    assert torch.equal(probe.model(torch.arange(9)[None], use_cache=False).logits, whole)


class Wrong:
    """A loop that skips the layers next to those it is told to."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def skipping(self, configuration: Configuration) -> Any:
        other = [i for i in range(len(configuration.actions)) if i not in configuration.changed]
        return self._loop.skipping(Configuration.of(len(configuration.actions), {"skip": other[1:]}))


@pytest.mark.parametrize("part", ["sweep", "generate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_that_computes_something_else_is_not_timed(
    part: str, dtype: torch.dtype, lively: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def wrong(probe: Probe) -> Iterator[Any]:
        with LOOPS[0].applied(probe) as loop:
            yield Wrong(loop)

    @contextlib.contextmanager
    def broken(probe: Probe) -> Iterator[Any]:
        raise ValueError("no such\nmodel")
        yield

    monkeypatch.setattr(sampled, "LOOPS", (LOOPS[0], Competitor("wrong", wrong), Competitor("broken", broken)))
    case = scores(dtype=dtype) if part == "sweep" else generate.case("tiny", LAYERS, DIRECTIONS, 1, dtype, FULL)
    assert case.variants.keys() == {OURS, LOOPS[0].name}
    assert case.different.keys() == {"wrong"}
    assert case.skipped == {"broken": "ValueError: no such model"}


def test_ours_is_judged_like_the_loops(lively: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is compared with plain transformers, not with itself."""
    own = generate.generate

    def garbled(*args: Any) -> Any:
        answers = own(*args)
        return answers[1:] + answers[:1]

    monkeypatch.setattr(generate, "generate", garbled)
    case = generate.case("tiny", LAYERS, DIRECTIONS, 1, torch.float32, FULL)
    assert OURS not in case.variants and "deviations below the best" in case.different[OURS]


@pytest.mark.parametrize("kind", sweep.KINDS)
@pytest.mark.parametrize("what", ["grid", "input,output"])
def test_the_floor_is_every_product_of_the_different_states(kind: str, what: str) -> None:
    model, asked = tiny().model, sweep.questions(kind, 3, 512)
    layers, trie = ResidentLayers(model), Trie(distinct(configurations(what, 4))[0])
    with FlopCounterMode(display=False) as counter:
        score(Engine(layers), SweepHead(model), trie, asked)
    layers.close()
    counts = counter.get_flop_counts()["Global"]
    ours = counts[torch.ops.aten.mm] + counts[torch.ops.cogsym.token_scores]
    assert sweep.sweep_floor(model, trie, asked).flops == ours


def test_the_floor_of_writing_is_every_row_that_differs() -> None:
    model, asked = tiny().model, [Generate(tuple(range(i, i + 9)), 5) for i in (0, 40)]
    layers, trie = ResidentLayers(model), Trie(distinct(configurations("output", 4))[0][:-1])
    products, rows = generate.generate_floor(Engine(layers), SweepHead(model), trie, asked)
    layers.close()
    # All four configurations pass through the prompt's 4 layers once. Then rows share layers while texts agree.
    assert 4 * 2 * 4 <= rows <= (4 + 3 + 2 + 1) * 2 * 4
    D, F, heads, groups, d, V = 64, 160, 4, 2, 16, 512
    layer = 2 * (D * (heads + 2 * groups) * d + heads * d * D + 3 * D * F)
    assert products.flops == (4 * 18 + rows) * layer + 5 * 4 * 2 * 2 * D * V


def test_a_floor_in_pieces_is_the_whole() -> None:
    from cogsym.bench.floor import COLUMNS, ROWS, Products

    products = Products(torch.float32, CPU)
    products.add_many(ROWS + 7, (2 * COLUMNS + 5, 3))
    products.add_many(5, (11, 3))
    products()
    assert products.flops == 2 * 3 * ((ROWS + 7) * (2 * COLUMNS + 5) + 5 * 11)


@pytest.mark.parametrize("number", [1, 2, 6, 100])
def test_the_sample_keeps_as_many_layers_as_all_do(number: int) -> None:
    for what, layers in (("grid", 30), ("input,output", 24), ("single", 12)):
        every = distinct(configurations(what, layers))[0]
        some = sampled.evenly_spaced(every, number)
        assert len(set(some)) == min(number, len(every))
        facts = sampled.sample_facts(some, every)
        assert abs(facts["kept_layers_of_those"] - facts["kept_layers_of_all"]) <= max(1, layers / 6 / number)


def test_the_fastest_settings_come_first() -> None:
    import time

    def run(settings: LoopOptions) -> None:
        cost = (settings.attention == "sdpa") + (settings.batch != 4) + settings.all_logits
        time.sleep(0.02 * cost)

    tried = sampled.tried_settings(run, 8, (False, True))
    assert next(iter(tried)) == LoopOptions("eager", 4, False)
    assert {s.batch for s in tried} == {1, 4, 8} and len(tried) == 6


def test_what_is_written_ends_where_it_is_told() -> None:
    probe, asked = tiny(), [Generate((3, 4, 5), 6), Generate((9, 8, 7), 6)]
    for competitor in HERE:
        with competitor.applied(probe) as loop:
            rows = texts(loop, Configuration.of(4, {"skip": [1]}), LoopOptions("sdpa", 2), asked, CPU)
        assert [len(row) for row in rows] == [6, 6]
