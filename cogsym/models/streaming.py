"""Weights that stay in the safetensors files of a checkpoint until a decoder layer is needed.

Sweeps and training read layers in the same way: as one piece of memory in which weights of one input lie beside each
other, straight from the file. Nothing is mapped, so that no page of the file counts as the process's memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cogsym.decoder import layers_of
from cogsym.errors import CogsymError
from cogsym.models.block import Block
from cogsym.models.loading import build_model, check_model_folder
from cogsym.records import reason

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNED = 64  # bytes: where a tensor of PyTorch's own begins
_PIECE = 2**22  # elements that are compared at once


class _Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors has it
    shape: tuple[int, ...]
    begin: int  # bytes, from the file's beginning


class WeightFiles:
    """The tensors of a folder by name, read when they are asked for.

    A file that is no more as it was when the folder was opened is read no more: every method then raises a CogsymError.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the files' headers.

        Raises:
            CogsymError: it is not a local folder of safetensors.
        """
        path = check_model_folder(folder)
        if path is None:
            raise CogsymError(
                f"Layers are streamed from a local folder, and {str(folder)!r} is none; download it first."
            )
        self.folder = path
        self._stored: dict[str, _Stored] = {}
        self._identities: dict[Path, tuple[int, ...]] = {}
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                self._identities[file] = _identity(opened)
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            header.pop("__metadata__", None)
            for name, it in header.items():
                self._stored[name] = _Stored(file, it["dtype"], tuple(it["shape"]), 8 + size + it["data_offsets"][0])

    def __contains__(self, name: str) -> bool:
        """Whether `read` gives a tensor of that name: it is there, in floating point of 16 bits or more."""
        return name in self._stored and self._stored[name].dtype in _DTYPES

    def check(self, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint that does not have its weights as the model has them."""
        for name in names:
            if name not in self._stored:
                raise CogsymError(
                    f"{self.folder} holds no weight named {name}, so its layers cannot be streamed; leave streaming "
                    "off."
                )
            if (dtype := self._stored[name].dtype) not in _DTYPES:
                raise CogsymError(
                    f"{self.folder} holds {name} as {dtype}, expected floating point of 16 bits or more, so its "
                    "layers cannot be streamed; leave streaming off."
                )
        for name, shape in shapes.items():
            if (held := self._stored[name].shape) != shape:
                raise CogsymError(
                    f"{self.folder} holds {name} of shape {held}, expected {shape}, as its config.json says; fetch or "
                    "write the two again."
                )

    def check_tied(self, tied: Mapping[str, str]) -> None:
        """Refuse weights that are to be one and are not; transformers then lets them be two."""
        for name, source in tied.items():
            if name in self._stored and source in self._stored and not torch.equal(self.read(name), self.read(source)):
                raise CogsymError(
                    f"{self.folder} holds different weights named {name} and {source}, which its config.json ties; "
                    "load the model and save it again with tie_word_embeddings=False."
                )

    def read(self, name: str) -> Tensor:
        """A tensor, in the dtype that it is stored in."""
        stored = self._stored[name]
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill a contiguous tensor on the CPU, of the same shape."""
        stored = self._stored[name]
        if _DTYPES[stored.dtype] != out.dtype:
            out.copy_(self.read(name))
            return
        with self._opened(stored.file) as file:
            _fill(file, stored.begin, out)

    def copy(self, folder: Path, held: Mapping[str, Tensor]) -> None:
        """Write the checkpoint to another folder, a file at a time.

        Args:
            folder: is there.
            held: what may have changed, by name, in memory. What has not, seen in the dtype that it is held in, stays
                as it is stored, bit for bit.

        Raises:
            OSError: it was not written.
        """
        files = list(dict.fromkeys(stored.file for stored in self._stored.values()))
        for file in files:
            with self._opened(file):
                shutil.copyfile(file, folder / file.name)
        for name, tensor in held.items():
            if (stored := self._stored.get(name)) is not None:  # one of two that are tied may not be
                with (folder / stored.file.name).open("r+b", buffering=0) as copied:
                    _write_changes(copied, stored, tensor.detach().reshape(-1))
        if [file.name for file in files] != ["model.safetensors"]:
            sizes = (torch.Size(s.shape).numel() * _DTYPES[s.dtype].itemsize for s in self._stored.values())
            index = {
                "metadata": {"total_size": sum(sizes)},
                "weight_map": {name: stored.file.name for name, stored in self._stored.items()},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def keep(self, names: Iterable[str]) -> None:
        """Forget the tensors of other names, which are none of the model's."""
        self._stored = {name: self._stored[name] for name in names if name in self._stored}

    @contextmanager
    def _opened(self, file: Path) -> Iterator[FileIO]:
        try:
            with file.open("rb", buffering=0) as opened:
                if _identity(opened) != self._identities[file]:
                    raise CogsymError(
                        f"{file} has changed since the model was opened, so its weights are read no more; put back "
                        "what it was and begin or resume again."
                    )
                yield opened
        except FileNotFoundError:
            raise CogsymError(
                f"{file} is gone, and the weights in it are read from there; put it back and begin or resume again."
            ) from None


class Layout:
    """Where in one piece of memory a layer's weights lie, those of one input beside each other.

    Attributes:
        nbytes: of that memory.
    """

    def __init__(self, layer: nn.Module, block: Block | None) -> None:
        """Lay out the weights of a layer, which are not there yet, in the dtypes that they have in it.

        Args:
            layer: on the meta device.
            block: its description, or None.
        """
        tensors = layer.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in tensors.items()}
        groups = [
            [names[id(module.weight)] for module in projections.modules]
            for projections in (block.projections() if block else ())
            if all(isinstance(module, nn.Linear) for module in projections.modules)
        ]
        beside = {name for group in groups for name in group[1:]}
        order = [name for group in groups for name in group]
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self.nbytes = 0
        for name in dict.fromkeys([*order, *tensors]):
            begin = self.nbytes if name in beside else -(-self.nbytes // _ALIGNED) * _ALIGNED
            self._places[name] = (begin, tensors[name].dtype, tensors[name].shape)
            self.nbytes = begin + tensors[name].nbytes

    def read(self, files: WeightFiles, prefix: str, memory: Tensor) -> None:
        """Fill the memory, uint8 [at least nbytes] on the CPU, with the tensors `prefix` + name."""
        for name, view in self._views(memory):
            files.read_into(prefix + name, view)

    def put(self, layer: nn.Module, memory: Tensor) -> None:
        """Make what lies in the memory the layer's weights."""
        for name, view in self._views(memory):
            _set(layer, name, view)

    def take_out(self, layer: nn.Module) -> None:
        """Leave the layer without weights, as before `put`."""
        for name, (_, dtype, shape) in self._places.items():
            _set(layer, name, torch.empty(shape, dtype=dtype, device="meta"))

    def _views(self, memory: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, (begin, dtype, shape) in self._places.items():
            yield name, memory[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _UninitialisedOnMeta(TorchFunctionMode):
    """What is made without values, as weights are, takes no memory, not even until it is moved to the meta device:
    what lies in between would leave the process a heap of holes, as large as the model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def empty_model(folder: str | Path, config: Any, dtype: torch.dtype) -> Any:
    """A causal language model in evaluation mode without its weights: parameters are on the meta device.

    Raises:
        CogsymError: transformers cannot build it.
    """
    with init_empty_weights(include_buffers=False), _UninitialisedOnMeta():
        model = build_model(folder, config, dtype=dtype).eval()
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def layers_prefix(model: Any) -> str:
    """What the names of the decoder layers' weights begin with; a layer's index follows."""
    layers = layers_of(model)
    (prefix,) = (f"{name}." for name, module in model.named_modules() if module is layers)
    return prefix


def stored_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of what a checkpoint of the model must hold, by name: of weights that are tied, one."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def read_around_layers(
    model: Any, files: WeightFiles, device: torch.device, dtype: torch.dtype, in_memory: Iterable[int] = ()
) -> None:
    """Fill an empty model with all its weights but those of the decoder layers.

    Args:
        model: as `empty_model` gives it.
        files: its weights.
        device: where to.
        dtype: what they become.
        in_memory: layers that are read too.

    Raises:
        CogsymError: the files are not those of the model, or its layers share weights.
    """
    tied, prefix = getattr(model, "all_tied_weights_keys", None) or {}, layers_prefix(model)
    if shared := next((name for name in tied if name.startswith(prefix)), None):
        raise CogsymError(
            f"The layers of {type(model).__name__} share weights such as {shared}, so they cannot be streamed; leave "
            "streaming off."
        )
    files.check_tied(tied)
    files.check(shapes := stored_shapes(model), shapes)
    here = tuple(f"{prefix}{i}." for i in in_memory)
    for name in shapes:
        if not name.startswith(prefix) or name.startswith(here):
            set_module_tensor_to_device(model, name, device, value=files.read(name), dtype=dtype)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _identity(file: FileIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, begin: int, out: Tensor) -> None:
    """Read bytes from a place in a file into a contiguous tensor."""
    file.seek(begin)
    rest = _bytes_of(out)
    while rest:
        try:
            number = file.readinto(rest)
        except OSError as error:
            raise CogsymError(f"{file.name!s} cannot be read ({reason(error)}); mend that and resume.") from error
        if not number:
            raise CogsymError(f"{file.name!s} is cut short; fetch or write it again.")
        rest = rest[number:]


def _write_changes(file: FileIO, stored: _Stored, now: Tensor) -> None:
    """Write a tensor over itself, piece by piece, where it is another."""
    dtype = _DTYPES[stored.dtype]
    for first in range(0, len(now), _PIECE):
        piece = now[first : first + _PIECE].cpu()
        before, begin = torch.empty(len(piece), dtype=dtype), stored.begin + first * dtype.itemsize
        _fill(file, begin, before)
        if not torch.equal(before.to(piece.dtype), piece):
            file.seek(begin)
            rest = _bytes_of(piece.to(dtype))
            while rest:
                rest = rest[file.write(rest) :]


def _set(layer: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, name = name.rpartition(".")
    module = layer.get_submodule(owner)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
