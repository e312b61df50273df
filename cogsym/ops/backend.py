"""Which backend computes an operation here, and why not a faster one.

A kernel lists its backends from the fastest to the slowest: the C++ extension for CPU tensors, Triton for CUDA tensors,
whatever else there is. Behind them stands its reference in plain PyTorch, which takes everything. `Kernel.route` names
the first that takes what is asked; dispatch, `cogsym info` and `cogsym.explain` all ask it, so that none of them can
name another than the one that runs.

The environment variable ``COGSYM_BACKEND`` (``reference``, ``cpp`` or ``triton``) forces one, for comparison and for
hunting a fault; what a kernel has no such backend for, the reference computes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cogsym.errors import CogsymError

BACKENDS = ("reference", "cpp", "triton")
# What the kernels read and write; everything inside is computed in float32 (float64 for float64).
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Facts = Mapping[str, Any]


class Route(NamedTuple):
    """Where a computation goes."""

    backend: str
    reason: str  # why not to a faster backend, one phrase; empty where it is the fastest for that device


@dataclass(frozen=True)
class Backend:
    """One way to compute a kernel.

    Attributes:
        name: "cpp", "triton", or another's.
        function: takes the reference's arguments; or "module:function", imported when it is first called.
        devices: types of device that it is for.
        dtypes: of the first argument.
        needs: a module without which it cannot run, or None.
        refuses: keywords of facts -> why it does not take such arguments, or None. A fact that is not given has the
            default value.
        on_demand: types of device that it takes besides where COGSYM_BACKEND asks for it.
    """

    name: str
    function: Callable[..., Any] | str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    needs: str | None = None
    refuses: Callable[..., str | None] | None = None
    on_demand: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """The function."""
        return _imported(self.function) if isinstance(self.function, str) else self.function

    def why_not(self, device: str, dtype: torch.dtype, facts: Callable[[], Facts]) -> str | None:
        """Why it does not compute this, or None."""
        if self.needs is not None and (reason := _missing(self.needs)):
            return reason
        if dtype not in self.dtypes:
            return f"{self.name} takes {_listed(self.dtypes)}"
        return None if self.refuses is None else self.refuses(device=device, dtype=dtype, **facts())


def cpp(function: Callable[..., Any], refuses: Callable[..., str | None] | None = None) -> Backend:
    """CPU tensors, by the C++ extension."""
    return Backend("cpp", function, ("cpu",), needs="cogsym._C", refuses=refuses)


def triton(function: str, refuses: Callable[..., str | None] | None = None) -> Backend:
    """CUDA tensors, by Triton; `function` is "module:function", as Triton is imported when it is needed."""
    return Backend("triton", function, ("cuda",), needs="triton", refuses=refuses, on_demand=("cpu", "meta"))


class Kernel:
    """A function with several backends.

    Args:
        name: of the function.
        reference: computes it in plain PyTorch; the documentation of the others.
        backends: from the fastest to the slowest.
        facts: arguments -> what a backend may refuse, by name. None: nothing but device and dtype matters.
        parts: kernels that the reference is made of; its route is the slowest of theirs.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        backends: tuple[Backend, ...] = (),
        *,
        facts: Callable[..., Facts] | None = None,
        parts: tuple[Kernel, ...] = (),
    ) -> None:
        self.name, self.reference, self.backends, self.parts = name, reference, backends, parts
        self._facts = facts

    def route(self, device: torch.device, dtype: torch.dtype, **facts: Any) -> Route:
        """Where arguments of which the first has this device and dtype are computed.

        Args:
            device: need not be here.
            dtype: of the first argument.
            facts: what else the backends look at, by name.

        Raises:
            TypeError: a fact that no backend of this kernel looks at.
        """
        known = self.facts_known()
        if unknown := facts.keys() - known:
            expected = f"one of {', '.join(sorted(known))}" if known else "none"
            raise TypeError(f"route: {self.name} has no fact {sorted(unknown)[0]!r}, expected {expected}.")
        chosen, reason = self._choose(device.type, dtype, lambda: facts)
        if chosen is not None:
            return Route(chosen.name, reason)
        routes = [
            part.route(device, dtype, **{name: facts[name] for name in facts.keys() & part.facts_known()})
            for part in self.parts
        ]
        slowest = max(routes, key=lambda route: (route.backend == "reference", bool(route.reason)), default=None)
        return Route("reference", reason) if slowest is None else Route(slowest.backend, reason or slowest.reason)

    def implementation(self, *args: Any) -> Callable[..., Any]:
        """The function that computes this for such arguments."""
        first = args[0]
        device = "cpu" if first.is_cpu else first.device.type
        facts = self._facts
        chosen, _ = self._choose(device, first.dtype, (lambda: facts(*args)) if facts else dict)
        return self.reference if chosen is None else chosen.load()

    def facts_known(self) -> set[str]:
        """Names of what its backends look at."""
        known: set[str] = set().union(*(part.facts_known() for part in self.parts))
        for backend in self.backends:
            if backend.refuses is not None:
                known |= inspect.signature(backend.refuses).parameters.keys()
        return known - {"device", "dtype"}

    def _choose(self, device: str, dtype: torch.dtype, facts: Callable[[], Facts]) -> tuple[Backend | None, str]:
        """The backend, None for the reference; and why none of the faster ones."""
        name, reason = forced(), ""
        for backend in self.backends:
            if device not in backend.devices and not (name and device in backend.on_demand):
                continue
            if name and name != backend.name:
                why_not: str | None = f"COGSYM_BACKEND is {name}"
            else:
                why_not = backend.why_not(device, dtype, facts)
            if why_not is None:
                return backend, reason
            reason = reason or why_not
        if not reason and not self.parts:
            reason = f"{self.name} has no kernel for {device} tensors"
        return None, reason


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    return None if backend == "reference" else _missing({"cpp": "cogsym._C"}.get(backend, backend))


def forced() -> str | None:
    """The backend named by ``COGSYM_BACKEND``, or None.

    Raises:
        CogsymError: the name is unknown or that backend cannot run here.
    """
    name = os.environ.get("COGSYM_BACKEND")
    if not name:
        return None
    if name not in BACKENDS:
        raise CogsymError(f"COGSYM_BACKEND is {name!r}, expected one of {', '.join(BACKENDS)}; correct or unset it.")
    if reason := unavailable(name):
        raise CogsymError(f"COGSYM_BACKEND is {name!r} but {reason}; unset it to use what is here.")
    return name


@functools.cache
def _missing(module: str) -> str | None:
    """Why a module cannot be imported here, or None."""
    # The extension links to the OpenMP library that torch has already loaded: torch is imported first, above.
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not import: {error}"
    # An editable install offers its own extension to the sources of any other tree, of another version perhaps.
    package, home = Path(__file__).parents[1], Path(found.__file__ or "").parent
    if module.startswith("cogsym.") and home != package:
        return f"{module} lies in {home}, expected {package}, whose sources run"
    return None


@functools.cache
def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(names)} and {last}" if names else last
