"""One declaration an operation: everything that lists operations finds one that another package adds, too."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packages import install
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cogsym import info
from cogsym.errors import CogsymError
from cogsym.ops import Operation, backend, operations, register_operation, rms_norm, rms_norm_input_gradient, route
from cogsym.ops import operation as operation_module

sys.path.insert(0, str(Path(__file__).parent))
from recorded import Calls, calls, example_of, run

EXAMPLES = {name: operation for name, operation in operations().items() if operation.example}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_registered_form_that_an_example_meets(best_backend: str, name: str) -> None:
    """torch's own check of schema, fake, autograd rule and tracing, for the operation and for its gradient."""
    made = calls(EXAMPLES[name])
    if name == "linear" and best_backend == "reference":
        assert not made  # PyTorch's own product, for tracers to see
        return
    assert made
    for overload, args in made:
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_it_says(best_backend: str, name: str) -> None:
    """PyTorch's own way has the same outputs and gradients, and the shorter way the same bits as the registered one."""
    example = example_of(EXAMPLES[name], torch.float64)
    ours, plain = run(example), run(operation_module.Example(**{**vars(example), "ours": example.plain}))
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)
    with Calls():  # a mode, for which the registered form is used
        registered = run(example)
    assert all(torch.equal(a, b) for a, b in zip(ours, registered, strict=True))


@pytest.mark.parametrize("backend_name", ["reference", "best"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_autocast_changes_nothing_inside(name: str, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed in float32 within an operation on bfloat16 is no affair of autocast's, forward or backward."""
    monkeypatch.setenv("COGSYM_BACKEND", "reference" if backend_name == "reference" else "")
    torch.manual_seed(0)
    example = example_of(EXAMPLES[name], torch.bfloat16)
    want = run(example)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(example)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------- the way past the registered form


@pytest.fixture
def overloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations whose registered form was called."""
    called: list[str] = []
    for operation in operations().values():
        overload = operation.overload

        def recording(*args: Any, overload: Any = overload, name: str = operation.name) -> Any:
            called.append(name)
            return overload(*args)

        monkeypatch.setattr(operation, "overload", recording)
    return called


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, torch.ones(4), 1e-6)


def test_nobody_looks(overloads: list[str]) -> None:
    x = torch.randn(3, 4)
    y = norm(x)
    leaf = x.clone().requires_grad_()
    z = norm(leaf)
    z.sum().backward()
    parameter = torch.nn.Parameter(torch.ones(4))
    rms_norm(x, parameter, 1e-6).sum().backward()
    with torch.inference_mode():
        assert torch.equal(norm(x), y)
    assert overloads == [] and torch.equal(y, z) and leaf.grad is not None and parameter.grad is not None
    assert not y.requires_grad and z.requires_grad


def test_who_looks_finds_the_registered_form(overloads: list[str]) -> None:
    x = torch.randn(3, 4)
    with Calls() as modes:
        norm(x)
        norm(x.clone().requires_grad_()).sum().backward()
    expected = ["rms_norm", "rms_norm", "rms_norm_backward"]
    assert overloads == expected and [f"{f}".split(".")[1] for f, _ in modes.made] == expected
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        norm(x)
    assert "cogsym::rms_norm" in {event.name for event in seen.events()}
    graph = torch.fx.experimental.proxy_tensor.make_fx(norm)(x)
    assert any("cogsym.rms_norm" in str(node.target) for node in graph.graph.nodes)
    assert len(overloads) == 5


def test_flops_are_counted() -> None:
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    from cogsym.ops import AttentionOptions, attention

    with FlopCounterMode(display=False) as counter:
        attention(q, q, q, AttentionOptions(1.0))[0].sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 8 * 21


def test_tensors_that_are_more_than_tensors(overloads: list[str]) -> None:
    with FakeTensorMode():
        fake = torch.empty(3, 4, device="cuda")
        weight = torch.ones(4, device="cuda")
    assert rms_norm(fake, weight, 1e-6).device.type == "cuda"

    class Tagged(Tensor):
        pass

    rms_norm(torch.randn(3, 4).as_subclass(Tagged), torch.ones(4), 1e-6)
    assert overloads == ["rms_norm", "rms_norm"]


def test_transforms_meet_the_registered_form(overloads: list[str]) -> None:
    """Of which PyTorch refuses functorch's, where the kernel itself would compute without seeing them."""
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: norm(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        norm(x)
    assert overloads == ["rms_norm", "rms_norm"]


def test_a_gradient_that_there_is_none_of_is_refused(best_backend: str) -> None:
    """Of a gradient: there is no second derivative, and no silent zero."""
    h = torch.randn(3, 4, requires_grad=True)
    dx = rms_norm_input_gradient(torch.ones(3, 4), h, torch.ones(4), 1e-6)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="autograd"):
        dx.sum().backward()


def test_autocast_changes_nothing(best_backend: str) -> None:
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, norm(x))


# ---------------------------------------------------------------- routes


def kernels() -> dict[str, backend.Kernel]:
    """Every operation that has backends of its own, and the kernels that others are made of."""
    found: dict[str, backend.Kernel] = {}

    def add(kernel: backend.Kernel) -> None:
        found[kernel.name] = kernel
        for part in kernel.parts:
            add(part)

    for operation in operations().values():
        add(operation)
    return {name: kernel for name, kernel in found.items() if kernel.backends}


def backend_of(kernel: backend.Kernel, function: Callable[..., Any]) -> str:
    """Whose function it is."""
    names = [b.name for b in kernel.backends if b.load() is function]
    return names[0] if names else "reference"


@pytest.fixture(params=[None, "reference", "cpp", "triton"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param is None:
        monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    elif backend.unavailable(request.param):
        pytest.skip(f"{request.param} is not here")
    else:
        monkeypatch.setenv("COGSYM_BACKEND", request.param)
    yield


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("name", kernels())
def test_dispatch_calls_what_the_route_names(asked: None, name: str, device: str) -> None:
    """For tensors of any device, here or not: the function that would be called belongs to the backend."""
    kernel = kernels()[name]
    for dtype in DTYPES:
        x = fake(8, dtype, device)
        facts: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {})]
        if name in ("attention", "attention_backward"):
            facts = list(attention_arguments(dtype, device, name))
        if name in ("linear", "linear_input_gradient"):
            facts = [(args, known) for args, known in linear_arguments(x, name)]
        if name == "head_statistics":
            facts = [((x, x, x, cap, 1.0), {"soft_cap": cap}) for cap in (0.0, 30.0)]
        for args, known in facts:
            found = kernel.route(torch.device(device), dtype, **known)
            function = kernel.implementation(*args)
            if kernel.parts and function is kernel.reference:
                continue  # computed by its parts, each of which is looked at by itself
            assert backend_of(kernel, function) == found.backend, (dtype, known, found)
            fastest = next((b.name for b in kernel.backends if device in b.devices), None)
            assert bool(found.reason) == (found.backend != fastest), (dtype, known, found)


def linear_arguments(x: Tensor, name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(arguments, facts) with weights of each type."""
    for dtype in DTYPES:
        weight = x.new_empty(7, x.shape[-1], dtype=dtype)
        rows = {"rows": x.numel() // x.shape[-1]} if name == "linear" else {}
        yield (x, weight, None) if name == "linear" else (x, weight), {"weight_dtype": dtype, **rows}


def fake(head_dim: int, dtype: torch.dtype, device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(2, 3, 4, head_dim, dtype=dtype, device=device)


def attention_arguments(dtype: torch.dtype, device: str, name: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(arguments, facts) of attention of many kinds; what starts say is in their values, which a fake GPU has not."""
    given = [None, torch.zeros(2, 3, dtype=torch.int32)] if device == "cpu" else [None]
    for starts, window, soft_cap, head_dim in itertools.product(given, (None, 2), (None, 5.0), (8, 7)):
        q, options = fake(head_dim, dtype, device), (1.0, window, soft_cap)
        facts = {"window": window, "soft_cap": soft_cap, "head_dim": head_dim}
        facts["sequences"] = "whole" if starts is None else "by starts"
        forward = (q, q, q, starts, None, *options)
        yield (forward if name == "attention" else (*[q] * 6, starts, *options, True, True, True)), facts


def test_routes_that_were_told_wrong_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library's flash attention does not take goes to ours, and to all logits what neither takes."""
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    cuda, half, single = torch.device("cuda"), torch.bfloat16, torch.float32
    assert route("attention", cuda, half) == ("flash", "")
    assert route("attention", cuda, single).reason == "PyTorch's flash attention takes bfloat16 and float16"
    assert route("attention", cuda, half, soft_cap=30.0).reason == "PyTorch's flash attention has no soft cap"
    assert route("attention", cuda, half, head_dim=320).backend == "reference"
    assert route("attention", cuda, single, head_dim=128).backend == "reference"
    assert route("attention", cuda, half, window=128, head_dim=64).backend == "flash"
    assert route("linear_cross_entropy", torch.device("mps"), half).backend == "reference"
    if backend.unavailable("triton"):
        return
    assert route("attention", cuda, single, head_dim=64).backend == "triton"
    assert route("attention", cuda, half, soft_cap=30.0).backend == "triton"
    assert route("attention", cuda, half, sequences="by starts").backend == "triton"
    assert route("linear_cross_entropy", cuda, half) == ("triton", "")
    assert route("token_scores", cuda, half, soft_cap=30.0) == ("triton", "")


@pytest.mark.skipif(bool(backend.unavailable("cpp")), reason=f"{backend.unavailable('cpp')}")
def test_scores_say_where_they_need_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogsym import _C

    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    cpu, before = torch.device("cpu"), _C.isa()
    assert route("token_scores", cpu, torch.float32) == ("cpp", "in blocks of logits, as one pass takes bfloat16")
    _C.set_isa("baseline")
    assert "baseline kernels have no tiles" in route("token_scores", cpu, torch.bfloat16).reason
    _C.set_isa(before)
    if before == "amx_bf16":
        assert route("token_scores", cpu, torch.bfloat16) == ("cpp", "")
        assert "no soft cap" in route("token_scores", cpu, torch.bfloat16, soft_cap=30.0).reason


def test_without_the_extension_the_reason_is_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_missing", lambda module: f"{module} does not import: no compiler")
    cpu = torch.device("cpu")
    assert route("rotary", cpu, torch.float32) == ("reference", "cogsym._C does not import: no compiler")
    assert route("attention", cpu, torch.float32) == ("flash", "cogsym._C does not import: no compiler")


def test_the_extension_of_other_sources_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an editable install of another clone offers it."""
    other = ModuleType("cogsym._C")
    other.__file__ = str(tmp_path / "_C.so")
    monkeypatch.setitem(sys.modules, "cogsym._C", other)
    assert f"cogsym._C lies in {tmp_path}, expected " in (backend._missing.__wrapped__("cogsym._C") or "")


def test_a_forced_backend_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGSYM_BACKEND", "reference")
    assert route("rotary", torch.device("cpu"), torch.float32) == ("reference", "COGSYM_BACKEND is reference")


def test_names_and_facts_that_there_are_not() -> None:
    with pytest.raises(CogsymError, match=r"The operation 'rms_nrom' is unknown.*did you mean rms_norm"):
        route("rms_nrom", torch.device("cpu"), torch.float32)
    with pytest.raises(TypeError, match="attention has no fact 'softcap', expected one of empty, head_dim, sequences"):
        route("attention", torch.device("cpu"), torch.float32, softcap=1.0)
    with pytest.raises(TypeError, match="rotary has no fact 'window', expected none"):
        route("rotary", torch.device("cpu"), torch.float32, window=1)


def test_info_says_what_the_routes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rows = dict(info.describe())
    assert rows.keys() >= {name for name, operation in operations().items() if operation.part_of is None}
    served = rows["attention"].partition("; ")[2]
    assert served == (
        "flash in bfloat16 and float16, triton in float32 (PyTorch's flash attention takes bfloat16 and float16) "
        "on cuda"
    )


# ---------------------------------------------------------------- another package's operation

SOURCE = '''
"""y = x · factor + shift, with a backend of its own: nothing of cogsym lists it."""

from typing import Any

import torch
from torch import Tensor

from cogsym.ops import Operation
from cogsym.ops.backend import Backend
from cogsym.ops.operation import Example, Sizes

CALLS = []


def scaled_sum_reference(x: Tensor, shift: Tensor, factor: float) -> Tensor:
    return x * factor + shift


def scaled_sum_numpy(x: Tensor, shift: Tensor, factor: float) -> Tensor:
    CALLS.append("numpy")
    return torch.from_numpy(x.numpy() * factor + shift.numpy()).to(x.dtype)


def refuses(device: str, dtype: torch.dtype, wide: bool = False) -> str | None:
    return "numpy is asked for narrow rows" if wide else None


def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.factor = inputs[2]


def backward(ctx: Any, dy: Tensor) -> tuple:
    need_x, need_shift, _ = ctx.needs_input_grad
    return dy * ctx.factor if need_x else None, dy if need_shift else None, None


def example(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Example:
    x, shift = (torch.randn(sizes.length, sizes.width, device=device).to(dtype) for _ in range(2))
    ours, plain = lambda x, shift: (SCALED_SUM(x, shift, 2.0),), lambda x, shift: (torch.add(shift, x, alpha=2.0),)
    return Example({"x": x, "shift": shift}, ours, plain, ("x", "shift"), "B", {"forward": 3, "backward": 3})


SCALED_SUM = Operation(
    "acme::scaled_sum",
    scaled_sum_reference,
    fake=lambda x, shift, factor: torch.empty_like(x),
    backends=(Backend("numpy", scaled_sum_numpy, ("cpu",), (torch.float32, torch.float64), "numpy", refuses),),
    facts=lambda x, shift, factor: {"wide": x.shape[-1] > 100},
    autograd=(setup, backward),
    flops=lambda x, *_, **__: 2 * x[0] * x[1],
    example=example,
)
'''


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A package beside cogsym with an operation, found by its entry point."""
    site = tmp_path_factory.mktemp("site")
    install(site, "acme", {"cogsym.operations": {"acme::scaled_sum": "acme:SCALED_SUM"}}, SOURCE)
    registry = operation_module.OPERATIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        registry.__dict__.pop("_offered", None)
        assert "acme::scaled_sum" in operations() and "acme" in sys.modules
        yield sys.modules["acme"]
    registry._objects.pop("acme::scaled_sum")
    registry.__dict__.pop("_offered", None)
    del sys.modules["acme"]


def test_another_packages_operation_is_everywhere(acme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    operation = operations()["acme::scaled_sum"]
    cpu = torch.device("cpu")
    assert route("acme::scaled_sum", cpu, torch.float32) == ("numpy", "")
    assert route("acme::scaled_sum", cpu, torch.float32, wide=True).reason == "numpy is asked for narrow rows"
    assert route("acme::scaled_sum", cpu, torch.bfloat16).reason == "numpy takes float32 and float64"
    assert "numpy" in dict(info.describe())["acme::scaled_sum"]
    for overload, args in calls(operation):
        torch.library.opcheck(overload, args)
    with FlopCounterMode(display=False) as counter:
        operation(torch.ones(3, 4), torch.ones(3, 4), 2.0)
    assert counter.get_total_flops() == 24


def test_another_packages_operation_computes(acme: Any, overloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COGSYM_BACKEND", raising=False)
    operation = operations()["acme::scaled_sum"]
    acme.CALLS.clear()
    for wanted in ((False, False), (True, False), (False, True), (True, True)):
        x, shift = (torch.randn(3, 4, dtype=torch.float64).requires_grad_(w) for w in wanted)
        y = operation(x, shift, 2.0)
        torch.testing.assert_close(y, 2 * x + shift)
        if any(wanted):
            y.sum().backward()
        assert [t.grad is not None for t in (x, shift)] == list(wanted)
    assert acme.CALLS == ["numpy"] * 4 and overloads == []
    operation(torch.ones(3, 400), torch.ones(3, 400), 2.0)  # too wide
    assert len(acme.CALLS) == 4
    compiled = torch.compile(lambda x, s: operation(x, s, 3.0) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(2, 2), torch.ones(2, 2)), torch.full((2, 2), 5.0))


def test_a_name_is_taken_once(acme: Any) -> None:
    with pytest.raises(CogsymError, match="operation 'acme::scaled_sum' is registered already"):
        register_operation(acme.SCALED_SUM)
    with pytest.raises(CogsymError, match="offered as 'sum', expected its own name, 'acme::scaled_sum'"):
        operation_module.OPERATIONS._check("sum", acme.SCALED_SUM)
    assert isinstance(acme.SCALED_SUM, Operation)
