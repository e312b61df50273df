"""An operation: one declaration from which dispatch, autograd, tracing, counts, tests and benchmarks all read.

An operation is registered with torch under its name. There torch.compile and other tracers find its shapes, dispatch
modes (counts of FLOPs, of launches) and profilers its name, autograd its rule. All that costs several times what a
small kernel takes, so where nobody looks the kernel is called without it: see `Operation.__call__`.

A module makes an `Operation` and hands it to `register_operation`. A package that is installed may name its own as
entry points of the group ``cogsym.operations`` instead, and need not be imported:

    [project.entry-points."cogsym.operations"]
    "acme::scaled_sum" = "acme.scaled_sum:SCALED_SUM"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from cogsym.errors import CogsymError
from cogsym.ops.backend import Backend, Facts, Kernel, Route
from cogsym.registry import Registry

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Rule = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Of a batch and of the model it goes through; examples are made for them.

    Attributes:
        rows: sequences.
        length: tokens of each.
        width: of the residual stream.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: features of a head.
        mlp_width: of the MLP's middle.
        vocabulary: tokens of the head.
    """

    rows: int
    length: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int


@dataclass(frozen=True)
class Example:
    """An operation at work: what benchmarks time, and generic tests and counts go through.

    Attributes:
        inputs: by the names that `ours` and `plain` give them.
        ours: computes the outputs.
        plain: PyTorch's own way, the fastest there is without compiling.
        differentiated: names of the inputs that get a gradient.
        unit: what bounds it: "B" of memory passed over, or "FLOP".
        work: of one call, by direction: "forward", "backward" or "both".
    """

    inputs: dict[str, Tensor]
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    differentiated: tuple[str, ...]
    unit: str
    work: dict[str, float]

    def __post_init__(self) -> None:
        for name in self.differentiated:
            self.inputs[name].requires_grad_()


MakeExample = Callable[[Sizes, torch.dtype, torch.device], Example]


class Operation(Kernel):
    """A kernel that is registered with torch; called, it computes.

    Args:
        name: "package::operation", or the operation's name alone in cogsym's own namespace.
        reference: computes it in plain PyTorch, in float64 too. Its annotations are the operation's schema: tensors,
            numbers and strings, positional. Its first argument, a tensor, decides by device and dtype; the other
            tensors are on its device.
        check: refuses arguments whose shapes or dtypes do not fit, by raising; called before they are computed with,
            by whatever way they come, and with fake tensors too.
        fake: makes empty outputs of the right shape, dtype and strides, for tracers.
        backends: faster ways than the reference, from the fastest to the slowest; each takes the reference's arguments
            and returns new, contiguous tensors.
        facts: arguments -> what else a backend may refuse, by name.
        parts: kernels that the reference is made of, whose backends are then this operation's.
        autograd: (setup(ctx, inputs, output), backward(ctx, *gradients)), as torch.autograd.Function has them.
        flops: its FLOPs, from the arguments with shapes for tensors.
        part_of: the operation with which this one is listed: a gradient, say.
        example: it at work, for benchmarks and generic tests.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        check: Callable[..., None] | None = None,
        backends: tuple[Backend, ...] = (),
        facts: Callable[..., Facts] | None = None,
        parts: tuple[Kernel, ...] = (),
        autograd: tuple[Setup, Rule] | None = None,
        flops: Callable[..., int] | None = None,
        part_of: str | None = None,
        example: MakeExample | None = None,
    ) -> None:
        super().__init__(name, reference, backends, facts=facts, parts=parts)
        self.part_of, self.example, self._check = part_of, example, check
        self._parameters = tuple(inspect.signature(reference).parameters)
        namespace, _, own = f"cogsym::{name}".rpartition("::")
        namespace = namespace.removeprefix("cogsym::")
        schema = torch.library.infer_schema(reference, mutates_args=())
        computed, faked = self._checked(self._compute), self._checked(fake)
        registered = torch.library.custom_op(f"{namespace}::{own}", computed, mutates_args=(), schema=schema)
        registered.register_fake(faked)
        self._function = None
        if autograd is not None:
            setup, backward = autograd
            registered.register_autograd(backward, setup_context=setup)
            self._function = _function(own, self._compute, setup, backward)
        self.overload = getattr(getattr(torch.ops, namespace), own).default
        if flops is not None:
            register_flop_formula(self.overload.overloadpacket)(flops)

    def __call__(self, *args: Any) -> Any:
        """The result, by the shortest way that nobody can tell from the registered one.

        Where no mode, tracer, transform or profiler looks and no tensor is more than a tensor, the kernel is called
        itself; with a gradient to come, by an autograd function with the registered rule.

        Raises:
            RuntimeError: tensors are on different devices.
            ValueError: shapes do not fit, as the operation's own file says; TypeError for dtypes.
        """
        if _watched():
            return self.overload(*args)
        grad_enabled, gradient = torch.is_grad_enabled(), False
        on_cpu = args[0].is_cpu
        for x in args:
            kind = type(x)
            if kind is Tensor or kind is torch.nn.Parameter:
                gradient = gradient or (grad_enabled and x.requires_grad)
                if not (x.is_cpu if on_cpu else x.device == args[0].device):
                    self._check_devices(args)
            elif isinstance(x, Tensor):
                return self.overload(*args)
        if self._check is not None:
            self._check(*args)
        if not gradient:
            return self._compute(*args)
        return self.overload(*args) if self._function is None else self._function.apply(*args)

    def _compute(self, *args: Any) -> Any:
        function = self.implementation(*args)
        if function is not self.reference or not torch.is_autocast_enabled(args[0].device.type):
            return function(*args)
        with torch.autocast(args[0].device.type, enabled=False):  # else it would round the reference's float32 products
            return function(*args)

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of arguments that fit."""

        def checked(*args: Any) -> Any:
            self._check_devices(args)
            if self._check is not None:
                self._check(*args)
            return function(*args)

        return checked

    def _check_devices(self, args: tuple[Any, ...]) -> None:
        first = args[0].device
        for name, x in zip(self._parameters, args, strict=False):
            if isinstance(x, Tensor) and x.device != first:
                raise RuntimeError(
                    f"{self.part_of or self.name}: {self._parameters[0]} is on {first} and {name} on {x.device}, "
                    "expected one device; move one of them."
                )


def _watched() -> bool:
    """Whether anything but the caller has to see which operation this is."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def _function(name: str, compute: Callable[..., Any], setup: Setup, backward: Rule) -> Any:
    """The autograd function with this rule."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = compute(*args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _check(name: str, operation: Operation) -> None:
    if name != operation.name:
        raise CogsymError(f"An operation is offered as {name!r}, expected its own name, {operation.name!r}.")


OPERATIONS: Registry[Operation] = Registry("operation", "cogsym.operations", _check)


def register_operation(operation: Operation) -> Operation:
    """Make an operation known to everything that lists them, and give it back.

    Raises:
        CogsymError: there is one of its name.
    """
    OPERATIONS.register(operation.name, operation)
    return operation


def operations() -> dict[str, Operation]:
    """Every operation by name, those of installed packages too."""
    return {name: OPERATIONS[name] for name in OPERATIONS}


def route(name: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> Route:
    """Which backend computes an operation, and why not a faster one; what dispatch asks, too.

    Args:
        name: of the operation.
        device: of its tensors; need not be here.
        dtype: of its tensors.
        facts: what else its backends look at. For "attention": `head_dim`, `window` and `soft_cap` (as in
            `AttentionOptions`), `sequences` ("whole", "end to end" for packed ones, "overlapping" for any other
            starts). For "token_scores": `soft_cap`.

    Raises:
        CogsymError: no operation has that name.
        TypeError: the operation has no such fact.
    """
    return OPERATIONS[name].route(device, dtype, **facts)
