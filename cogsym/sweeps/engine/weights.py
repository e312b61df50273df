"""Where a sweep's decoder layers come from: a model in memory, or a checkpoint of which one layer is read at a time."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor

from cogsym.decoder import decoder_of, layers_of
from cogsym.errors import CogsymError
from cogsym.models import Block, UnknownLayerError, precision, read_block
from cogsym.models.attention import AttentionHalf
from cogsym.models.guard import why_own
from cogsym.models.int8 import to_int8
from cogsym.models.loading import build_model, load_config
from cogsym.models.projections import Projections
from cogsym.models.streaming import Layout, WeightFiles, empty_model, layers_prefix, read_around_layers, stored_shapes
from cogsym.sweeps.layers.actions import Weights


class Loaded(NamedTuple):
    """A decoder layer whose weights are there.

    Attributes:
        layer: the model's module.
        block: its description; None where it can only run its own forward.
    """

    layer: Any
    block: Block | None


class LayerSource(Protocol):
    """The decoder layers of a model, and those of a base checkpoint with the same shapes where there is one.

    Attributes:
        model: the causal language model; its decoder layers may be without weights.
        device: where it computes.
        reasons: why layers run their own forward, one sentence each; where there is one, all of them do.
        block: a description of the first layer; None where layers run their own forward.
        blocks: of each layer; None for one that runs its own forward altogether.
        has_base: a base checkpoint is at hand.
        widened: weights of 16 bits are multiplied in float32.
        int8: the layers' linear maps hold 8 bits.
    """

    model: Any
    device: torch.device
    reasons: list[str]
    blocks: list[Block | None]
    has_base: bool
    widened: bool
    int8: bool

    @property
    def block(self) -> Block | None:
        """See above."""

    def widen(self) -> None:
        """Multiply weights of 16 bits in float32, as `cogsym.models.precision.widen` does it."""

    def walk(self, needed: Sequence[tuple[int, set[Weights]]]) -> Iterator[dict[Weights, Loaded]]:
        """Layers in the order they are needed, each there until the next is asked for."""

    def pack(self) -> None:
        """Products of few rows are about to come."""

    def revisions(self) -> dict[Weights, str]:
        """SHA-256 of the weights, as a key of results: the same in memory and streamed."""


class ResidentLayers:
    """A model in memory. `close` undoes what was done to it, but for weights in int8, which stay so.

    Attributes:
        packs: whether `pack` may make a copy.
    """

    def __init__(self, model: Any, base: Any | None = None, int8: bool = False) -> None:
        """Use a model's layers.

        Args:
            model: a causal language model of transformers.
            base: another of the same shapes, whose layers `revert` puts in.
            int8: quantise the layers' linear maps, for good.

        Raises:
            CogsymError: the model has no decoder layers, or the base is of another shape.
        """
        layers_of(model)
        self.model, self.device, self.has_base = model, model.device, base is not None
        self.reasons: list[str] = []
        self.widened, self.int8 = False, int8
        # What is packed is multiplied in the weights' own type.
        self.packs = self.device.type == "cpu" and not int8 and not precision.stored_dtypes(model)
        self._models: dict[Weights, Any] = {"model": model}
        if base is not None:
            check_same_shape(model, base)
            self._models["base"] = base
        self._training = [module for each in self._models.values() for module in each.modules() if module.training]
        for module in self._training:
            module.training = False
        self._layers = {which: self._read(each) for which, each in self._models.items()}
        self.blocks = [loaded.block for loaded in self._layers["model"]]
        self._revisions = self._hashes() if int8 else {}  # of the weights as they were
        for projections in self._plain():
            _lay(projections, int8)

    @property
    def block(self) -> Block | None:
        """See `LayerSource`."""
        return None if self.reasons else self.blocks[0]

    def widen(self) -> None:
        """See `LayerSource`; `close` undoes it."""
        self.widened, self.packs = True, False
        for model in self._models.values():
            precision.widen(model)

    def walk(self, needed: Sequence[tuple[int, set[Weights]]]) -> Iterator[dict[Weights, Loaded]]:
        """See `LayerSource`."""
        for layer, _ in needed:
            yield {weights: layers[layer] for weights, layers in self._layers.items()}

    def pack(self) -> None:
        """See `LayerSource`. A second copy of the weights is made where there is plenty of room for it."""
        if self.packs and 4 * self.packed_bytes() < psutil.virtual_memory().available:
            for projections in self._plain():
                projections.pack()

    def packed_bytes(self) -> int:
        """What the copy that `pack` makes takes."""
        return sum(m.weight.nbytes for projections in self._plain() for m in projections.modules)

    def revisions(self) -> dict[Weights, str]:
        """See `LayerSource`."""
        return self._revisions or self._hashes()

    def _hashes(self) -> dict[Weights, str]:
        result: dict[Weights, str] = {}
        for which, model in self._models.items():
            weights, widened = dict(model.named_parameters()), precision.stored_dtypes(model)
            dtypes = {name: widened.get(name, t.dtype) for name, t in weights.items()}
            result[which] = _digest(weights, weights.__getitem__, dtypes)
        return result

    def close(self) -> None:
        """Give the weights storage of their own again, and modules that were in training mode that mode."""
        for projections in self._plain():
            projections.unpack()
            projections.part()
        if self.widened:
            for model in self._models.values():
                precision.narrow(model)
        for module in self._training:
            module.training = True

    def _read(self, model: Any) -> list[Loaded]:
        return [Loaded(layer, _block(layer, self.reasons)) for layer in layers_of(model)]

    def _plain(self) -> list[Any]:
        blocks = [loaded.block for layers in self._layers.values() for loaded in layers if loaded.block]
        return [p for block in blocks for p in block.projections() if p.plain()]


class StreamedLayers:
    """A checkpoint in safetensors: embeddings, final norm and head in memory, one layer at a time and the next one."""

    def __init__(
        self,
        folder: str | Path,
        base: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        int8: bool = False,
    ) -> None:
        """Open a checkpoint.

        Args:
            folder: a local folder that save_pretrained wrote.
            base: another of the same shapes, whose layers `revert` puts in.
            dtype: of the weights; None takes the checkpoint's own.
            device: where to compute.
            int8: quantise the linear maps of each layer as it is read.

        Raises:
            CogsymError: not a local folder of safetensors, weights of other names, a base of another shape.
        """
        self.device, self.has_base = torch.device(device), base is not None
        self.reasons: list[str] = []
        self.widened, self.int8 = False, int8
        config = load_config(folder)
        self._dtype = dtype or config.dtype or torch.float32
        self.model = empty_model(folder, config, self._dtype)
        self._files: dict[Weights, WeightFiles] = {"model": WeightFiles(folder)}
        if base is not None:
            with init_empty_weights():
                check_same_shape(self.model, build_model(base, load_config(base)))
            self._files["base"] = WeightFiles(base)
        self._prefix, layers = layers_prefix(self.model), layers_of(self.model)
        read_around_layers(self.model, self._files["model"], self.device, self._dtype)
        if base is not None:
            shapes = stored_shapes(self.model)
            # A base may have fewer tokens than the model.
            self._files["base"].check(shapes, {n: s for n, s in shapes.items() if n.startswith(self._prefix)})
        # Read by a thread of their own, while the model's may have another forward for a moment.
        config = decoder_of(self.model).config
        self._untouched = [copy.deepcopy(layer, {id(config): config}) for layer in layers]
        self.blocks = [_block(layer, self.reasons, weights_follow=True) for layer in layers]
        self._layouts = [Layout(layer, _block(layer, [], weights_follow=True)) for layer in self._untouched]
        self.block = None if self.reasons else self.blocks[0]

    def pack(self) -> None:
        """See `LayerSource`. Each layer is there too shortly for it."""

    def widen(self) -> None:
        """See `LayerSource`; each layer as it is read."""
        self.widened = True
        precision.widen(self.model)  # of the layers, only the forwards of their empty modules

    def walk(self, needed: Sequence[tuple[int, set[Weights]]]) -> Iterator[dict[Weights, Loaded]]:
        """See `LayerSource`. The next layer is read while one computes."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead: Future[dict[Weights, Loaded]] | None = None
            for i, (layer, weights) in enumerate(needed):
                loaded = ahead.result() if ahead else self._load(layer, weights)
                ahead = reader.submit(self._load, *needed[i + 1]) if i + 1 < len(needed) else None
                yield loaded

    def revisions(self) -> dict[Weights, str]:
        """See `LayerSource`."""
        names = [name for name, _ in self.model.named_parameters()]

        return {
            which: _digest(names, files.read, dict.fromkeys(names, self._dtype)) for which, files in self._files.items()
        }

    def _load(self, layer: int, weights: set[Weights]) -> dict[Weights, Loaded]:
        """A layer of its own with these weights, so that nothing holds them once it is dropped."""
        layout, config, loaded = self._layouts[layer], decoder_of(self.model).config, {}
        for which in weights:
            memory = torch.empty(layout.nbytes, dtype=torch.uint8)
            layout.read(self._files[which], f"{self._prefix}{layer}.", memory)
            module = copy.deepcopy(self._untouched[layer], {id(config): config})
            layout.put(module, memory.to(self.device))
            loaded[which] = Loaded(module, block := _block(module, []))
            for projections in block.projections() if self.int8 and block else ():
                if projections.plain():
                    _lay(projections, True)
            if self.widened:
                precision.widen(module)
        return loaded


def check_same_shape(model: Any, base: Any) -> None:
    """Refuse a base checkpoint whose layers do not fit.

    Raises:
        CogsymError: another number of layers, another kind of layer, or other shapes.
    """
    ours, theirs = layers_of(model), layers_of(base)
    if len(ours) != len(theirs):
        raise CogsymError(f"The base checkpoint has {len(theirs)} layers, expected {len(ours)}, as the model has.")
    for layer, other in zip(ours, theirs, strict=True):
        if type(layer) is not type(other):
            raise CogsymError(
                f"The base checkpoint has {type(other).__name__}s, expected {type(layer).__name__}s, as the model has."
            )
        shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
        for name, t in other.state_dict().items():
            if shapes.get(name) != tuple(t.shape):
                raise CogsymError(
                    f"The base checkpoint's {name} has shape {tuple(t.shape)}, expected {shapes.get(name)}, as in the "
                    "model; give the checkpoint that the model was adapted from."
                )


def _lay(projections: Projections, int8: bool) -> None:
    """Lay plain weights beside each other, in 8 bits where that is asked for."""
    if int8:
        for module in projections.modules:
            module.weight.requires_grad_(False)
            to_int8(module)
    projections.join()


def _digest(names: Iterable[str], tensor: Callable[[str], Tensor], dtypes: Mapping[str, torch.dtype]) -> str:
    """Of tensors by name, each as it is in a dtype."""
    digest = hashlib.sha256()
    for name in sorted(names):
        weight = tensor(name).detach().to(dtypes[name])
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _block(layer: Any, reasons: list[str], weights_follow: bool = False) -> Block | None:
    """The layer's description; None, and the reason among `reasons`, where all of it runs its own forward."""
    try:
        block = read_block(layer, weights_follow)
        reason = why_own(layer, weights_follow)
        if not isinstance(block.attention, AttentionHalf):
            reason = block.attention.reason
    except UnknownLayerError as error:
        block, reason = None, str(error)
    if reason and reason not in reasons:
        reasons.append(reason)
    return None if reason else block
