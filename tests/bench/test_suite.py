"""The suite runs from end to end at a tiny shape, times nothing that computes something else, and leaves no trace."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from cogsym import cli
from cogsym.bench import competitor as competitor_module
from cogsym.bench import (
    generate,
    install,
    ops,
    overhead,
    parity,
    plots,
    report,
    sampled,
    speed,
    study,
    suite,
    sweep,
    train,
)
from cogsym.bench.case import OURS, Case, Setting, measure
from cogsym.bench.speed import Speed
from cogsym.bench.trainers import COMPETITORS, Competitor, Job

CPU = torch.device("cpu")
QUICK = Setting(("tiny",), CPU, full=False)
FAST = Speed(torch.bfloat16, {torch.bfloat16: 1e12, torch.float32: 1e11})
ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`cogsym bench` in this process, with the fewest rounds."""
    monkeypatch.setenv("COLUMNS", "300")
    # Time enough for everybody, and one round.
    monkeypatch.setattr(suite, "QUICK_SECONDS", dict.fromkeys(suite.STUDIES, 600.0))
    monkeypatch.setattr(speed, "measured", lambda device: FAST)
    monkeypatch.setattr(study, "measure", lambda case, device, *_: measure(case, device, 1))
    monkeypatch.setattr(ops, "PASSES", 1)

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cogsym", "bench", *map(str, args)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return call


def test_quick_run(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(competitor_module.importlib.util, "find_spec", lambda name: None)
    parts = ("ops", "sweep", "generate", "train")
    status, out, err = command(*parts, "--model", "tiny", "--quick", "--out", tmp_path / "new")
    assert status == 0, err
    assert "Products run at 1,000 GFLOP/s in bfloat16 and 100 GFLOP/s in float32 here. Measured in bfloat16." in out
    assert "1/22  ops: tiny, 1024 tokens, bfloat16: gated_activation, forward, 40:00 left" in out
    for part in parts:
        result = report.read(tmp_path / "new" / f"{part}.json")
        assert (tmp_path / "new" / f"{part}.png").stat().st_size > 5000
        assert result["machine"]["torch"] == torch.__version__
        assert result["command"] == "cogsym bench ops sweep generate train --quick --device cpu --model tiny"
        for case in result["cases"]:
            assert OURS in case["variants"] and not case["different"], case
            head, rows = suite.STUDIES[part].table([case])
            assert all(len(row) == len(head) for row in rows)
        if part in ("sweep", "generate"):
            assert list(case["variants"]) == [OURS, "loop, kept layers"]
            assert case["skipped"]["TransformerLens"] == "transformer_lens is not installed"
            assert f"{case['facts']['done'] / case['variants'][OURS]['seconds']:,.0f}" in rows[0]
    names = {tuple(case["variants"]) for case in result["cases"]}
    plain = {"transformers, eager", "transformers, SDPA", "transformers, checkpointing"}
    assert all(plain <= set(n) for n in names)
    (outer,) = result["cases"]
    kept = {n: v["kept_bytes_a_token"] for n, v in outer["variants"].items()}
    assert kept[OURS] < kept["transformers, SDPA"] < kept["transformers, eager"]
    assert outer["skipped"]["torch.compile"] == "compiling takes minutes: --full"
    assert {"Liger-Kernel", "quack", "FlashAttention", "Unsloth"} <= outer["skipped"].keys()
    assert "compiling takes minutes" in out


@pytest.mark.parametrize("part", [name for name in suite.STUDIES if name != "overhead"])
def test_no_number_is_broken_on_a_narrow_screen(part: str) -> None:
    result = report.read(ROOT / "benchmarks" / "results" / "xeon-amx" / f"{part}.json")
    text = StringIO()
    report.show(result["cases"], suite.STUDIES[part].table, Console(file=text, width=80))
    words = text.getvalue().split()
    assert max(map(len, text.getvalue().splitlines())) <= 80 and not any("…" in word for word in words)
    for cell in (cell for row in suite.STUDIES[part].table(result["cases"])[1] for cell in row[1:]):
        assert set(cell.split()) <= set(words), cell


def test_a_run_that_is_killed_goes_on(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each case is kept as soon as it is measured, and what is there is not measured again."""
    asked: list[Case] = []

    def killed(case: Case, device: torch.device, *_: Any) -> Any:
        asked.append(case)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return measure(case, device, 1)

    few = dict(itertools.islice(ops.examples().items(), 2))
    monkeypatch.setattr(ops, "examples", lambda: few)
    monkeypatch.setattr(ops, "PASSES", 2)
    monkeypatch.setattr(study, "measure", killed)
    names = [spec.name for spec in ops.cases(QUICK)]
    options = ["ops", "--model", "tiny", "--out", tmp_path]
    with contextlib.suppress(KeyboardInterrupt):
        command(*options)
    before = report.read(tmp_path / "ops.json")["cases"]
    assert [case["name"] for case in before] == names[:3]
    status, out, _ = command(*options, "--resume")
    assert status == 0 and "1/5 " in out and len(asked) == 4 + 5
    cases = report.read(tmp_path / "ops.json")["cases"]
    assert [case["name"] for case in cases] == names
    assert [case["rounds_of_each_pass"] for case in cases] == [[1, 1]] * 4
    for was, now in zip(before, cases, strict=False):
        seconds = now["variants"][OURS]["seconds_of_each_round"]
        assert seconds[:1] == was["variants"][OURS]["seconds_of_each_round"] and len(seconds) == 2
    assert command(*options, "--resume")[0] == 0 and len(asked) == 9
    status, _, err = command(*options, "--full", "--resume")
    assert status == 2 and "cannot be gone on with: its setting is" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sing"], "The part is 'sing', expected one of ops, overhead, train, sweep, generate, install"),
        (["--model", "GPT-5"], "--model is 'GPT-5', expected one of SmolLM2-135M"),
        (["--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
        (["--device", "cuda"], "torch finds no GPU here"),
        (["ops", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(command: Callable[..., tuple[int, str, str]], args: list[str], message: str) -> None:
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a GPU here")
    status, _, err = command(*args)
    assert status == 2 and len(err.splitlines()) == 1 and message in err


def competitor(name: str, loss: Callable[[Job], Any]) -> Competitor[Job, Any]:
    @contextlib.contextmanager
    def applied(job: Job) -> Iterator[Any]:
        yield lambda: loss(job)

    return Competitor(name, applied)


def test_who_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job) -> Any:
        raise ValueError("no kernel for\nthis machine")

    added = (
        competitor("half", lambda job: job.call()() / 2),
        # The right loss, but the gradient of half of it.
        competitor("detached", lambda job: job.call()() / 2 + job.call()().detach() / 2),
        competitor("broken", broken),
        competitor("right", lambda job: job.call()()),
    )
    monkeypatch.setattr(train, "COMPETITORS", COMPETITORS[:1] + added)
    case = train.case("tiny", 4, 1, 64, "outer layers", QUICK)
    assert case.variants.keys() == {OURS, "right"}
    assert case.different["half"].startswith("its loss is 5.0e-01 away")
    assert case.different["detached"].startswith("its gradients are 5.0e-01 away")
    assert case.skipped == {"broken": "ValueError: no kernel for this machine"}


def test_an_operation_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return x, x + residual

    shape = ops.shape_of("tiny")
    case = ops.case("rms_norm", shape, shape.sizes(1, 8), torch.float32, "forward", CPU, {"wrong": wrong})
    assert "wrong" not in case.variants and "away from ours" in case.different["wrong"]
    assert ops.PLAIN in case.variants


@pytest.mark.parametrize("kind", ["outer layers", "LoRA on the outer layers"])
def test_a_turn_leaves_no_trace(kind: str) -> None:
    """After every competitor's turn the plain model computes exactly what it did before."""
    job = train.make_job("tiny", 4, 1, 64, kind != "outer layers", CPU)
    trained = [p for p in job.model.parameters() if p.requires_grad]

    def state() -> list[tuple[set[str], int, int]]:
        return [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in job.model.modules()]

    def plain() -> tuple[list[torch.Tensor], int]:
        with FlopCounterMode(display=False) as counter:
            loss, gradients = train.loss_and_gradients(competitor("plain", lambda job: job.call()()), job, trained)
        return [loss, *gradients], counter.get_total_flops()

    before, values = state(), plain()
    ran = []
    for c in COMPETITORS:
        if c.unavailable(CPU, full=False) is None:
            train.loss_and_gradients(c, job, trained)
            ran.append(c.name)
            assert state() == before, c.name
            assert plain()[1] == values[1], c.name
    assert len(ran) >= 4
    assert [p for p in job.model.parameters() if p.requires_grad] == trained
    assert all(torch.equal(a, b) for a, b in zip(plain()[0], values[0], strict=True))


def test_the_floor_is_every_product_of_a_step() -> None:
    """All linear maps and the head: what the plain step computes besides is attention."""
    job = train.make_job("tiny", 4, 1, 64, False, CPU)
    products = train.step_floor(job)
    with FlopCounterMode(display=False) as counter:
        job.call()().backward()
    counts = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm")) == products.flops


def test_liger_and_the_others_are_skipped_with_their_reason() -> None:
    reasons = {c.name: c.unavailable(CPU, full=True) for c in COMPETITORS}
    for name in ("Liger-Kernel", "quack", "FlashAttention", "Unsloth"):
        assert reasons[name] is not None
        assert "not installed" in reasons[name] or "GPU" in reasons[name]
    assert reasons["torch.compile"] is None


def test_torch_compile_has_its_budget_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config
    from torch._inductor import compile_fx

    budgets = []
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda graph, _: (budgets.append(config.activation_memory_budget), graph)[1]
    )
    job = train.make_job("tiny", 4, 1, 8, False, CPU, torch.float32)
    for c in COMPETITORS:
        if c.name.startswith("torch.compile"):
            with c.applied(job) as loss:
                loss()
    assert budgets == [1.0, 0.5]


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitor_module.importlib.util, "find_spec", lambda name: None)
    (cce,) = [c for c in COMPETITORS if c.name == "cut-cross-entropy"]
    assert cce.unavailable(CPU, full=True) == "cut_cross_entropy is not installed"


def test_parity_at_a_tiny_shape() -> None:
    facts = [spec.build().facts for spec in parity.cases(QUICK)]
    assert len(facts) == 3 * (len(ops.examples()) + len(parity.variations()) + 4) >= 3 * 15
    assert not [found for found in facts if not found["right"]]


def test_parity_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ops.examples()

    def wrong(*args: Any) -> Any:
        it = made["rotary"](*args)
        return dataclasses.replace(it, ours=lambda q, cos, sin: (it.ours(q, cos, sin)[0] + 1e-3 * q,))

    # The truth is computed by the same function in float64, so the plain way is what is off.
    monkeypatch.setattr(parity, "examples", lambda: made | {"rotary": wrong})
    ours, theirs = parity.operation("rotary", "tiny", torch.float32, CPU)["gradient of q"]
    assert ours < 1e-6 < 1e-4 < theirs


def test_an_install_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert "no source tree" in install._install().skipped[OURS]
    (tmp_path / "pyproject.toml").write_text("nothing")
    monkeypatch.setattr(
        install.process, "run", lambda command, **_: (_ for _ in ()).throw(install.CogsymError("no network"))
    )
    assert install._install().skipped[OURS] == "pip did not install it: no network"


def test_lora_is_compared_with_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COMPETITORS", [c for c in COMPETITORS if c.name in (OURS, "transformers, SDPA")])
    case = train.case("tiny", 4, 1, 64, train.JOBS[1], QUICK)
    assert case.variants.keys() == {OURS, "transformers, SDPA"}
    # q and o are 64 x 64, k and v 64 x 32, gate, up and down 64 x 160; in two layers, of rank 16.
    assert case.facts["trained_parameters"] == 2 * 16 * (2 * 128 + 2 * 96 + 3 * 224)
    assert case.counts[OURS]["kept_bytes_a_token"] < case.counts["transformers, SDPA"]["kept_bytes_a_token"]


def test_what_python_costs_is_that_of_a_call_and_of_a_token() -> None:
    specs = {spec.name: spec for spec in overhead.cases(QUICK)}
    assert {f"a call: {name}" for name in ops.examples()} < specs.keys() and len(specs) == len(ops.examples()) + 1
    call, step = (specs[name].build() for name in ("a call: rms_norm", list(specs)[-1]))
    ways = ("", ", recorded", ", with backward")
    assert call.variants.keys() == {f"{who}{way}" for who in (OURS, ops.PLAIN) for way in ways}
    assert {v.scale for v in step.variants.values()} == {1 / overhead.NEW_TOKENS}
    (tokens,) = {len(text) for row in step.variants[OURS].run() for text in row}
    assert tokens == overhead.NEW_TOKENS
    line = {"name": "a call: rms_norm"} | measure(call, CPU, 1)
    head, rows = overhead.STUDY.table([line])
    assert head == ["microseconds", *call.variants]
    assert rows[0][1] == f"{line['variants'][OURS]['seconds'] * 1e6:,.1f}"


def test_the_cases_of_a_full_run() -> None:
    full = Setting(suite.FULL_MODELS["cpu"], CPU, full=True)
    assert len(train.cases(full)) == 4
    assert len(ops.cases(full)) == 2 * 2 * 19
    assert len({p.name for p in ops.cases(full)}) == 76
    assert [p.name for p in install.cases(full)][-1] == "fresh install"
    assert len(sweep.cases(full)) == 5 + 4 + 1 and len(generate.cases(full)) == 4 + 1


def test_the_curve_of_a_sweep_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CURVE", (2, 4))
    monkeypatch.setattr(sampled, "LOOPS", sampled.LOOPS[:1])
    cases = [p for p in sweep.cases(Setting(("tiny",), CPU, full=True)) if "grid" in p.name and "choices" in p.name]
    lines = [{"name": p.name} | measure(p.build(), CPU, 1) for p in cases]
    assert [line["facts"]["configurations"] for line in lines] == [11, 2, 4]
    plots.draw_curve(lines, tmp_path / "sweep.json")
    assert (tmp_path / "sweep_curve.png").stat().st_size > 20_000


def test_pytest_benchmark_modules() -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    modules = ["benchmarks/bench.py", "--part", "ops", "--part", "sweep", "--part", "generate"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--model",
        "tiny",
        "--benchmark-disable",
        "-k",
        "rms_norm or grid or input",
    ]
    command = [sys.executable, "-m", "pytest", *options, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed, 17 deselected" in done.stdout
