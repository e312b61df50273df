"""An operation: one declaration from which dispatch, autograd, tracing, counts, tests and benchmarks all read.

An operation is registered with torch under its name. There torch.compile and other tracers find its shapes, dispatch
modes (counts of FLOPs, of launches) and profilers its name, autograd its rule. All that costs several times what a
small kernel takes, so where nobody looks the kernel is called without it: see `Operation.__call__`.

`register_operation` declares one, in cogsym or in another package; a package that is installed names its modules with
operations as entry points of the group ``cogsym.operations``, which are imported when operations are listed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from cogsym.ops.backend import Backend, Facts, Kernel, Route

ENTRY_POINTS = "cogsym.operations"

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
    """A kernel that is registered with torch; made by `register_operation`, which says what its arguments mean."""

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        backends: tuple[Backend, ...],
        facts: Callable[..., Facts] | None,
        parts: tuple[Kernel, ...],
        fake: Callable[..., Any],
        autograd: tuple[Setup, Rule] | None,
        flops: Callable[..., int] | None,
        part_of: str | None,
        example: MakeExample | None,
    ) -> None:
        namespace, _, own = name.rpartition("::")
        super().__init__(own if namespace in ("", "cogsym") else name, reference, backends, facts=facts, parts=parts)
        self.part_of, self.example = part_of, example
        schema = torch.library.infer_schema(reference, mutates_args=())
        qualified = f"{namespace or 'cogsym'}::{own}"
        registered = torch.library.custom_op(qualified, self._compute, mutates_args=(), schema=schema)
        registered.register_fake(fake)
        self._function = None
        if autograd is not None:
            setup, backward = autograd
            registered.register_autograd(backward, setup_context=setup)
            self._function = _function(own, self._compute, setup, backward)
        self.overload = getattr(getattr(torch.ops, namespace or "cogsym"), own).default
        if flops is not None:
            register_flop_formula(self.overload.overloadpacket)(flops)

    def __call__(self, *args: Any) -> Any:
        """The result, by the shortest way that nobody can tell from the registered one.

        Where no mode, tracer, transform or profiler looks and no tensor is more than a tensor, the kernel is called
        itself; with a gradient to come, by an autograd function with the registered rule.
        """
        if _watched():
            return self.overload(*args)
        grad_enabled, gradient = torch.is_grad_enabled(), False
        for x in args:
            kind = type(x)
            if kind is Tensor or kind is torch.nn.Parameter:
                gradient = gradient or (grad_enabled and x.requires_grad)
            elif isinstance(x, Tensor):
                return self.overload(*args)
        if not gradient:
            return self.implementation(*args)(*args)
        return self.overload(*args) if self._function is None else self._function.apply(*args)

    def _compute(self, *args: Any) -> Any:
        return self.implementation(*args)(*args)


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


_OPERATIONS: dict[str, Operation] = {}


def register_operation(
    name: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backends: tuple[Backend, ...] = (),
    facts: Callable[..., Facts] | None = None,
    parts: tuple[Kernel, ...] = (),
    autograd: tuple[Setup, Rule] | None = None,
    flops: Callable[..., int] | None = None,
    part_of: str | None = None,
    example: MakeExample | None = None,
) -> Operation:
    """Declare an operation; called, it computes.

    Args:
        name: "package::operation", or the operation's name alone in cogsym's own namespace.
        reference: computes it in plain PyTorch, in float64 too. Its annotations are the operation's schema: tensors,
            numbers and strings, positional. Its first argument, a tensor, decides by device and dtype.
        fake: makes empty outputs of the right shape, dtype and strides, for tracers.
        backends: faster ways than the reference, from the fastest to the slowest; each takes the reference's arguments
            and returns new, contiguous tensors.
        facts: arguments -> what else a backend may refuse, by name.
        parts: kernels that the reference is made of, whose backends are then this operation's.
        autograd: (setup(ctx, inputs, output), backward(ctx, *gradients)), as torch.autograd.Function has them.
        flops: its FLOPs, from the arguments with shapes for tensors.
        part_of: the operation with which this one is listed: a gradient, say.
        example: it at work, for benchmarks and generic tests.

    Raises:
        ValueError: an operation of that name is registered already.
    """
    operation = Operation(name, reference, backends, facts, parts, fake, autograd, flops, part_of, example)
    if operation.name in _OPERATIONS:
        raise ValueError(f"register_operation: {operation.name} is registered already; give yours another name.")
    _OPERATIONS[operation.name] = operation
    return operation


def operations() -> dict[str, Operation]:
    """Every operation by name, those of installed packages too."""
    _load_entry_points()
    return dict(_OPERATIONS)


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
        ValueError: no operation has that name.
        TypeError: the operation has no such fact.
    """
    found = _OPERATIONS.get(name) or operations().get(name)
    if found is None:
        close = difflib.get_close_matches(name, _OPERATIONS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(_OPERATIONS))}."
        raise ValueError(f"route: there is no operation {name!r}; {hint}")
    return found.route(device, dtype, **facts)


@functools.cache
def _load_entry_points() -> None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry_point.load()
