"""Frozen linear maps with weights of 8-bit integers, in a model that stays an ordinary one.

`to_int8` puts the integers into the module's own parameter, `weight`, and the scales of its rows beside it, in a buffer
that no checkpoint holds; the forward is `cogsym.ops.int8_linear`. `frozen_to_int8` remembers besides where the weights
came from: `state_dict` of such a module, and with it `save_pretrained`, has the original ones, read again from there
and held against their hash, and `to_original` puts them back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from cogsym import ops
from cogsym.errors import CogsymError
from cogsym.models.attachment import attach, attachment, detach
from cogsym.models.loading import check_model_folder
from cogsym.models.projections import SCALE, compute_dtype
from cogsym.models.streaming import WeightFiles
from cogsym.ops.int8_linear import quantise


@dataclass(frozen=True)
class Original:
    """Where a weight came from.

    Attributes:
        folder: of safetensors.
        name: in its files.
        dtype: that the model has it in.
        digest: SHA-256 of it in that dtype.
    """

    folder: Path
    name: str
    dtype: torch.dtype
    digest: str

    def read(self) -> Tensor:
        """The weight, on the CPU.

        Raises:
            CogsymError: it is gone, or another by now.
        """
        try:
            files = WeightFiles(self.folder)  # as they are now: they may have been written again, of the same weights
            weight = files.read(self.name) if self.name in files else None
        except (CogsymError, OSError) as error:
            raise self._gone(str(error)) from error
        if weight is None:
            raise self._gone("no file holds it")
        weight = weight.to(self.dtype)
        if _digest(weight) != self.digest:
            raise CogsymError(
                f"{self.folder} holds another {self.name} than when the frozen weights were quantised, expected the "
                "same one, which is saved with the trained ones; put its files back as they were."
            )
        return weight

    def _gone(self, why: str) -> CogsymError:
        return CogsymError(
            f"{self.folder} does not give {self.name} any more ({why}), which is saved with the trained weights; put "
            "its files back as they were."
        )


@dataclass(frozen=True)
class _Quantised:
    """Kept on a quantised module."""

    original: Original | None
    hooks: tuple[Any, ...] = ()


def to_int8(module: nn.Linear, original: Original | None = None) -> None:
    """Quantise a weight that has no gradient, in place; without `original` it cannot be had back.

    Raises:
        CogsymError: it has values that are not finite.
    """
    try:
        integers, scale = quantise(module.weight)
    except ValueError as error:
        where = f" ({original.name})" if original else ""
        raise CogsymError(f"A frozen weight{where} has values that are not finite, expected finite ones.") from error
    hooks: tuple[Any, ...] = ()
    if original is not None:
        hooks = (
            module.register_state_dict_post_hook(_save_original),
            module.register_load_state_dict_pre_hook(_load_original),
        )
    module.weight.data = integers
    module.register_buffer(SCALE, scale, persistent=False)
    attach(module, _forward, _Quantised(original, hooks))


def frozen_to_int8(model: nn.Module, modules: Iterable[nn.Linear]) -> None:
    """Quantise weights of a model that lies in safetensors, in place.

    Args:
        model: a causal language model of transformers, or peft's wrapper around one.
        modules: plain ones in it, whose weights have no gradient.

    Raises:
        CogsymError: the model did not come from safetensors, or these do not hold the weights that it has.
    """
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    names = {module: name for name, module in base.named_modules()}
    files = WeightFiles(_folder_of(base.config))
    for module in modules:
        name, weight = f"{names[module]}.weight", module.weight.detach().cpu()
        held = files.read(name).to(weight.dtype) if name in files else None
        if held is None or not torch.equal(held, weight):
            raise CogsymError(
                f"{name} is not in {files.folder} as the model has it, expected the same, as int8 weights are saved "
                "from there; save the model with save_pretrained and load it from that folder."
            )
        to_int8(module, Original(files.folder, name, weight.dtype, _digest(weight)))


def to_original(model: nn.Module) -> None:
    """Undo `frozen_to_int8`.

    Raises:
        CogsymError: a file is gone or changed; what is not put back yet stays as it is, and this can be tried again.
    """
    for module in model.modules():
        known = attachment(module)
        if not isinstance(known, _Quantised) or known.original is None:
            continue
        weight: Any = module.weight
        weight.data = known.original.read().to(weight.device)
        for hook in known.hooks:
            hook.remove()
        detach(module, _forward)
        delattr(module, SCALE)


def int8_modules(model: nn.Module) -> list[nn.Linear]:
    """The quantised modules."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and isinstance(attachment(m), _Quantised)]


def _forward(module: Any, x: Tensor) -> Tensor:
    if attachment(module) is None:
        return nn.Linear.forward(module, x)
    return ops.int8_linear(x.to(compute_dtype(x)), module.weight, getattr(module, SCALE), module.bias)


def _save_original(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    known = attachment(module)
    if isinstance(known, _Quantised) and known.original is not None:
        state[f"{prefix}weight"] = known.original.read().to(module.weight.device)


def _load_original(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    known, given = attachment(module), state.get(f"{prefix}weight")
    if not isinstance(known, _Quantised) or known.original is None or given is None:
        return
    if _digest(given.detach().cpu().to(known.original.dtype)) != known.original.digest:
        raise CogsymError(
            f"{prefix}weight is given another value while it is frozen in int8, expected its own; call cogsym.restore "
            "before other weights are loaded."
        )
    state[f"{prefix}weight"] = module.weight


def _folder_of(config: Any) -> Path:
    """Where a model was loaded from.

    Raises:
        CogsymError: from no folder that is there.
    """
    name = getattr(config, "name_or_path", "")
    if not name:
        raise CogsymError(
            "The model was not loaded from a folder, expected one, as int8 weights are saved from there; save it with "
            "save_pretrained and load it again."
        )
    if folder := check_model_folder(name):
        return folder.resolve()
    return Path(snapshot_download(name, revision=getattr(config, "_commit_hash", None), local_files_only=True))


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()
