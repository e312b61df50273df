"""Frozen layers whose weights stay on disk: read when they are computed with, and once more for the backward pass.

Two places in memory hold them: that of the layer which computes, and that of the one which is read meanwhile by a
thread of its own. Which one that is follows from what came next the last time, as each step of training takes its
layers in the same order; the first time it is the next one above in the forward pass, and below in the backward pass. A
layer that comes unexpectedly is waited for.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from cogsym.decoder import decoder_of, layers_of
from cogsym.errors import CogsymError
from cogsym.models import UnknownLayerError, precision, read_block
from cogsym.models.block import KeptBlock
from cogsym.models.half import Dial
from cogsym.models.inputs import LayerInputs
from cogsym.models.loading import load_config
from cogsym.models.streaming import (
    Layout,
    WeightFiles,
    empty_model,
    layers_prefix,
    read_around_layers,
    stored_shapes,
)
from cogsym.plan import LayerPlan

_ON_DISK = "_cogsym_on_disk"  # the attribute of a layer that says where its weights are
_Use = tuple[int, bool]  # (which layer, in the backward pass)


class StreamedBlock:
    """A frozen block whose weights are there only while it computes.

    Attributes:
        index: of the layer, 0 next to the embeddings.
        block: its description; its modules are no part of the model.
        nbytes: of its weights.
    """

    def __init__(self, index: int, layer: nn.Module, config: Any, reader: _Reader) -> None:
        """Describe a layer.

        Args:
            index: which one.
            layer: the model's, without weights.
            config: the decoder's, which is not copied.
            reader: where its weights come from.

        Raises:
            UnknownLayerError: all of the layer must run its own forward.
        """
        self.index, self._layer, self._reader = index, layer, reader
        self._filled = copy.deepcopy(layer, {id(config): config})
        self.block = read_block(self._filled, weights_follow=True)
        self._widened = False
        self.layout = Layout(self._filled, self.block)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedBlock:
        """A copy of the model reads the same weights."""
        return self

    @property
    def nbytes(self) -> int:
        """See above."""
        return self.layout.nbytes

    def run(self, x: Tensor, inputs: LayerInputs, dial: Dial) -> tuple[Tensor, KeptBlock]:
        """See `Block`."""
        with self._there(x.device, backward=False):
            return self.block.run(x, inputs, dial)

    def input_gradient(self, dy: Tensor, kept: KeptBlock, inputs: LayerInputs) -> Tensor:
        """See `Block`."""
        with self._there(dy.device, backward=True):
            return self.block.input_gradient(dy, kept, inputs)

    def with_own_attention(self, reason: str) -> StreamedBlock:
        """See `Block`."""
        other = copy.copy(self)
        other.block = self.block.with_own_attention(reason)
        return other

    def same_modules(self) -> bool:
        """Whether the model's layer is still made of the modules that are described."""
        return [*map(type, self._layer.modules())] == [*map(type, self._filled.modules())]

    @contextmanager
    def _there(self, device: torch.device, backward: bool) -> Iterator[None]:
        widened = any(map(precision.is_stored, self._layer.modules()))
        if widened != self._widened:
            (precision.widen if widened else precision.narrow)(self._filled)
            self._widened, self.layout = widened, Layout(self._filled, self.block)
        memory = self._reader.read(self, backward)
        self.layout.put(self._filled, memory.to(device))
        try:
            yield
        finally:
            self.layout.take_out(self._filled)


class _Slot:
    """A place in memory for one layer.

    Attributes:
        layout: of what it holds or is being filled with; None before.
        reading: done when it is there.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.layout: Layout | None = None
        self.reading: Future[None] = Future()


class _Reader:
    """Reads layers, the one that is likely to come next ahead of its turn."""

    def __init__(self, files: WeightFiles, prefix: str) -> None:
        self.blocks: dict[int, StreamedBlock] = {}
        self._files, self._prefix = files, prefix
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._slots = [_Slot(), _Slot()]  # of the layer that computes, and the other one
        self._followed: dict[tuple[_Use, _Use], _Use] = {}
        self._last: tuple[_Use, _Use] = ((-1, False), (-1, False))

    def read(self, block: StreamedBlock, backward: bool) -> Tensor:
        """A layer's weights; they stay until two others are asked for."""
        if self._slots[0].layout is not block.layout:
            self._slots.reverse()
            if self._slots[0].layout is not block.layout:
                self._begin(self._slots[0], block)
        slot = self._slots[0]
        try:
            slot.reading.result()
        except BaseException:
            slot.layout = None
            raise
        following = self.blocks[self._next((block.index, backward))]
        if all(each.layout is not following.layout for each in self._slots):
            self._begin(self._slots[1], following)
        return slot.memory

    def _begin(self, slot: _Slot, block: StreamedBlock) -> None:
        slot.layout = block.layout
        slot.reading = self._thread.submit(self._fill, slot, block.index, block.layout)

    def _fill(self, slot: _Slot, index: int, layout: Layout) -> None:
        if len(slot.memory) < layout.nbytes:
            slot.memory = torch.empty(layout.nbytes, dtype=torch.uint8)
        layout.read(self._files, f"{self._prefix}{index}.", slot.memory)

    def _next(self, use: _Use) -> int:
        """The layer that is likely to come after this one."""
        self._followed[self._last] = use
        self._last = (self._last[1], use)
        if self._last in self._followed:
            return self._followed[self._last][0]
        order, step = [*self.blocks], -1 if use[1] else 1
        place = order.index(use[0])
        return order[place + step if 0 <= place + step < len(order) else max(place - step, 0) % len(order)]


def load_streamed(folder: str | Path, plan: LayerPlan, dtype: torch.dtype | None = None) -> Any:
    """A model of which the layers that a plan freezes stay on disk, for `cogsym.prepare` and any training loop.

    Embeddings, final norm, head and the trained layers are in memory; the others' parameters are on the meta device,
    and their weights are read when a prepared model computes with them. `model.save_pretrained(folder)` writes a whole
    checkpoint: the files that were read, with what has changed written over. Names in `state_dict` are as ever. It
    trains in one process; generation, and what else needs all weights at once, takes the model that was saved.

    Args:
        folder: a local folder that `save_pretrained` wrote, in safetensors; it must stay as it is.
        plan: which layers are trained.
        dtype: of the weights; None takes the checkpoint's own.

    Returns:
        The model in evaluation mode, on the CPU; it may be moved to a GPU before `prepare`.

    Raises:
        CogsymError: not a local folder of safetensors, or one of another model; the plan does not fit; a frozen layer
            of which no half runs on cogsym's operations; or several processes.
    """
    if max(int(os.environ.get("WORLD_SIZE", 1)), _processes()) > 1:
        raise CogsymError(
            "Frozen layers are read from disk in one process and this is one of several; start one, or load the model "
            "into memory."
        )
    files, config = WeightFiles(folder), load_config(folder)
    dtype = dtype or config.dtype or torch.float32
    model = empty_model(folder, config, dtype)
    plan.parts(model)
    read_around_layers(model, files, torch.device("cpu"), dtype, plan.trained)
    files.keep([*stored_shapes(model), *(getattr(model, "all_tied_weights_keys", None) or {})])
    if (files.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.folder)
    reader, config = _Reader(files, layers_prefix(model)), decoder_of(model).config
    for i, layer in enumerate(layers_of(model)):
        if i not in plan.trained:
            try:
                reader.blocks[i] = StreamedBlock(i, layer, config, reader)
            except UnknownLayerError as error:
                raise CogsymError(
                    f"Layer {i} cannot be read from disk as it is needed ({error}); load the model into memory."
                ) from None
            vars(layer)[_ON_DISK] = reader.blocks[i]
            vars(layer)["_apply"] = partial(_stay, layer)
    vars(model)["save_pretrained"] = partial(_save, model, files)
    return model


def on_disk(layer: nn.Module) -> StreamedBlock | None:
    """What computes with a layer whose weights are on disk; None where they are in memory."""
    return vars(layer).get(_ON_DISK)


def _processes() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _stay(layer: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """Weights that are not there are not moved."""
    return layer


def _save(
    model: Any, files: WeightFiles, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **_: Any
) -> None:
    """`save_pretrained` of a model of which layers are on disk: a whole checkpoint, in the files that it was read from.

    Args:
        model: the model.
        files: what it was read from.
        save_directory: made where it is missing.
        state_dict: another than the model's own.

    Raises:
        CogsymError: the files are no more as they were.
        OSError: it was not written.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor for name, tensor in (state_dict or model.state_dict()).items() if not tensor.is_meta}
    files.copy(folder, held)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
