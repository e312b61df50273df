"""A CUDA device that computes nothing, on a build of PyTorch without CUDA: what is launched on it and waited for.

Tensors on "cuda" are PyTorch's fake ones: shapes, dtypes and strides without memory, so a trace costs the same for any
size. Everything above them is what runs on a GPU: dispatch, autograd's rules, launch functions, which backend serves
what. Integers and booleans keep their values, in a tensor on the CPU beside the fake one, so that what depends on them
goes the way it would go. Recorded are

    launches   calls that start a kernel: of PyTorch's operations, and of Triton kernels with their arguments
    waits      of the host for the device: values that are read, shapes that depend on values, copies that block
    forbidden  tensors whose size is a multiple of a product of sizes that no tensor may have

each wait and each forbidden tensor with the line that asked. Values of floating-point tensors there are none: what is
read of them is 1. Streams, events and memory are not modelled.

Import this before torch: `guard.cpp` has to be there when torch looks for a CUDA device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent


def built() -> Path:
    """The library of guard.cpp for the PyTorch that is installed; compiled where it is not there yet."""
    library = HERE / f"guard-{importlib.metadata.version('torch')}.so"
    if not library.exists() or library.stat().st_mtime < (HERE / "guard.cpp").stat().st_mtime:
        torch_folder = _torch_folder()
        new = library.with_suffix(f".{os.getpid()}.so")
        command = ["g++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-isystem", torch_folder / "include"]
        command += [HERE / "guard.cpp", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o", new]
        subprocess.run(command, check=True)
        new.replace(library)
    return library


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    return Path(spec.origin).parent


def _load() -> None:
    assert "torch" not in sys.modules, "import this before torch"
    folder = _torch_folder() / "lib"
    for name in ("libgomp*", "libc10.so", "libtorch_cpu.so"):
        for found in folder.glob(name):
            ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built()))


_load()

import torch
import transformers.masking_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from cogsym.models import calls, projections
from cogsym.ops import Operation

# What starts no kernel although it is no view.
_FREE = set(
    "empty empty_like new_empty new_empty_strided empty_strided detach lift_fresh set_ device _unsafe_view".split()
)
# What makes the host wait, as its result is a number or has a shape that depends on values.
_TOLD = set("_local_scalar_dense item nonzero equal masked_select _unique2 unique_dim unique_consecutive".split())


class _H100:
    """What is asked of a device."""

    name, major, minor, multi_processor_count = "no H100", 9, 0, 132
    total_memory, L2_cache_size = 80 * 2**30, 50 * 2**20


class Device(TorchDispatchMode):
    """The device, for as long as it is entered.

    Attributes:
        launches: by the name of the operation, or of the kernel behind "triton.".
        variants: of each Triton kernel the different specialisations; a GPU waits for each to be compiled.
        waits: by what is waited for and the line that asks.
        forbidden: by shape and line.
    """

    def __init__(self, forbidden: dict[str, int]) -> None:
        """Record.

        Args:
            forbidden: by what it is called a number of elements of which no tensor may have a multiple.
        """
        super().__init__()
        self._products = forbidden
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.forbidden: Counter[str] = Counter()
        self.variants: set[tuple[Any, ...]] = set()

    def forget(self) -> None:
        """Begin to record anew."""
        for record in (self.launches, self.waits, self.forbidden, self.variants):
            record.clear()

    @contextlib.contextmanager
    def there(self) -> Iterator[Device]:
        """Run on it what asks for "cuda"."""
        tensor, as_tensor = torch.tensor, torch.as_tensor
        patches: list[tuple[Any, str, Any]] = [
            (JITFunction, "run", lambda kernel, *args, **kwargs: self._launch(kernel, *args, **kwargs)),
            (Operation, "__call__", _call),
            (projections, "_joined", _joined),
            (projections.Projections, "join", lambda self: None),
            (projections.Projections, "plain", lambda self: all(type(m) is torch.nn.Linear for m in self.modules)),
            (torch, "tensor", _made(tensor)),
            (torch, "as_tensor", _made(as_tensor)),
            (
                Tensor,
                "new_tensor",
                lambda x, data, **k: torch.tensor(data, **{"dtype": x.dtype, "device": x.device} | k),
            ),
            (Tensor, "__getitem__", _item(Tensor.__getitem__)),
            (FakeTensor, "tolist", lambda x: x.cpu().tolist()),  # which asks for its elements one by one
            (calls._Outcome, "of", staticmethod(lambda x: x)),  # a subclass, which they cannot be
            (torch, "inference_mode", lambda *_: torch.no_grad()),  # its tensors are no fake ones
            (transformers.masking_utils, "is_tracing", lambda *_: False),
            *((torch.cuda, name, lambda *_, value=value: value) for name, value in _CUDA.items()),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(self)
            yield self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kwargs.pop("pin_memory", None)
        name = function._schema.name.partition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        here = any(x.is_cuda for x in tensors) or (target is not None and torch.device(target).type == "cuda")
        if not here and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if not here:
            return function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        elif name in _TOLD:
            self.waits[f"{name} {_line()}"] += 1
        elif name in ("index", "index_put_", "_unsafe_index_put", "index_put"):
            args = self._indexed(name, args)
        if not function.is_view and name not in _FREE:
            self.launches[name] += 1
        if name in ("_local_scalar_dense", "item", "equal", "nonzero"):
            with unset_fake_temporarily():
                found = _read(name, *args)
            return self._put(found) if name == "nonzero" else found
        if name == "_to_copy" and target is not None:
            return self._moved(args[0], kwargs)
        out = function(*args, **kwargs)
        self._carry(function, args, kwargs, out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._look(x)
        return out

    def _look(self, x: Tensor) -> None:
        for what, size in self._products.items():
            if x.numel() and x.numel() % size == 0:
                self.forbidden[f"{what} {list(x.shape)} {_line()}"] += 1

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        """Note a copy between host and device that the host waits for."""
        kinds = {x.device.type for x in args[:2] if isinstance(x, Tensor)}
        kinds |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if kinds == {"cpu", "cuda"} and not asynchronous:
            self.waits[f"copy {_line()}"] += 1

    def _moved(self, x: Tensor, kwargs: Any) -> Tensor:
        """A copy on another device, or in another dtype on the same."""
        with unset_fake_temporarily():
            value = _value(x).to(kwargs.get("dtype") or x.dtype, copy=True)
        return value if torch.device(kwargs["device"]).type == "cpu" else self._put(value)

    def _put(self, value: Tensor) -> Tensor:
        """On the device."""
        fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        if not value.is_floating_point():
            fake.value = value  # type: ignore[attr-defined]
        self._look(fake)
        return fake

    def _indexed(self, name: str, args: Any) -> Any:
        """The arguments of an index with places for masks."""
        indices: list[Any] = []
        for index in args[1]:
            if index is not None and not index.is_cuda and index.dim():
                self.waits[f"index from the host {_line()}"] += 1
            if index is not None and index.dtype == torch.bool:
                self.waits[f"mask as index {_line()}"] += 1
                with unset_fake_temporarily():
                    places = _value(index).nonzero().unbind(1)
                indices += map(self._put, places)
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def _carry(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Compute the values of integers, where those they are made of are known."""
        results = [x for x in tree_leaves(out) if isinstance(x, FakeTensor) and not x.is_floating_point()]
        if not results:
            return
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not all(_known(x) for x in given):
            for x in results:
                x.value = None  # type: ignore[attr-defined]
            return
        with unset_fake_temporarily():
            values, keywords = tree_map_only(Tensor, _value, (args, kwargs))
            if "device" in keywords:
                keywords["device"] = "cpu"
            computed = function(*values, **keywords)
        for x, value in zip(tree_leaves(out), tree_leaves(computed), strict=True):
            if isinstance(x, FakeTensor) and not x.is_floating_point():
                x.value = value  # type: ignore[attr-defined]

    def _launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        self.launches[f"triton.{name}"] += 1
        self.variants.add((name, *_specialisation(kernel, args, kwargs)))
        # The tokens that are chosen: each row another, as the rows of a sweep soon do.
        named = dict(zip(kernel.arg_names, args, strict=False))
        if (chosen := named.get("argmax_ptr")) is not None and _known(chosen):
            with unset_fake_temporarily():
                chosen.value.copy_(torch.arange(chosen.numel()).view(chosen.shape))


def _specialisation(kernel: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """What Triton compiles a kernel anew for."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {p.name for p in kernel.params if p.is_constexpr}
    for name, value in sorted(given.items()):
        if isinstance(value, Tensor):
            yield name, value.dtype, value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int) and name in kernel.arg_names and name not in constants:
            yield name, value == 1, value % 16 == 0, abs(value) < 2**31
        else:
            yield name, value


def _read(name: str, *args: Any) -> Any:
    """What the host is told."""
    if name == "nonzero":
        return _value(args[0]).nonzero()
    if name == "equal":
        return not all(map(_known, args)) or torch.equal(*map(_value, args))
    return _value(args[0]).item()


def _known(x: Any) -> bool:
    """Whether a tensor's values are."""
    return not isinstance(x, FakeTensor) or getattr(x, "value", None) is not None


def _value(x: Any) -> Any:
    """A tensor's values, on the CPU; ones where they are not known."""
    if not isinstance(x, FakeTensor):
        return x
    if _known(x):
        return x.value  # type: ignore[attr-defined]
    with unset_fake_temporarily():
        return torch.ones(x.shape, dtype=x.dtype)


def _line() -> str:
    """Who asked: the innermost line of cogsym, else of transformers, else of anything."""
    stack = traceback.extract_stack()[:-2]
    for folder in ("/cogsym/", "/kernels/", "/transformers/", "/"):
        for frame in reversed(stack):
            if folder in frame.filename and frame.filename != __file__:
                return f"{folder.strip('/')}/{frame.filename.rpartition(folder)[2]}:{frame.lineno} {frame.line}"
    return "?"


def _call(operation: Any, *args: Any) -> Any:
    """An operation by its short way, on which kernels are launched: by torch's, fake tensors have none."""
    operation._check_devices(args)
    if operation._check is not None:
        operation._check(*args)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return operation._function.apply(*args)
    return operation._compute(*args)


_JOINED: dict[tuple[int, ...], tuple[Any, Tensor]] = {}


def _joined(weights: list[Any]) -> Tensor:
    """Weights laid side by side, which fake parameters cannot be."""
    if len(weights) == 1:
        return weights[0]
    key = tuple(map(id, weights))
    if key not in _JOINED:
        first, rows = weights[0], sum(len(w) for w in weights)
        _JOINED[key] = weights, first.new_empty(rows, first.shape[1])
    return _JOINED[key][1]


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which goes past every mode: made on the host and then moved."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None) or _default()
        x = data if isinstance(data, Tensor) else make(data, *args, **kwargs)
        return x if device is None or torch.device(device).type == x.device.type else x.to(device)

    return made


def _default() -> torch.device | None:
    """Of `with torch.device(...)`."""
    modes = reversed(torch.overrides._get_current_function_mode_stack())
    return next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)


def _item(get: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.__getitem__, which makes a tensor of a list."""

    def item(x: Tensor, index: Any) -> Tensor:
        return get(x, torch.tensor(index) if isinstance(index, list) and x.is_cuda else index)

    return item


# Functions of torch.cuda, and what they return.
_CUDA: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "_lazy_init": None,
    "manual_seed_all": None,
    "get_rng_state": None,
    "set_rng_state": None,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_properties": _H100,
    "mem_get_info": (70 * 2**30, 80 * 2**30),
    "memory_reserved": 0,
    "memory_allocated": 0,
    "device": contextlib.nullcontext(),
}
