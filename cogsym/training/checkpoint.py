"""A checkpoint of a run: what lies in its folder, written and read without pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from cogsym.records import MANIFEST
from cogsym.training.sharded import part_for

TRAINED = "trained.safetensors"  # the trained parameters
OPTIMIZER = "optimizer.safetensors"  # its state, and the learning rate's
RANDOM = "random.json"  # the states of the random numbers
STATE = "trainer_state.json"  # Trainer's own
METRICS = "metrics.jsonl"  # the lines up to here
SETTINGS = "settings.json"  # what was asked of the run
FILES = (TRAINED, OPTIMIZER, RANDOM, STATE, METRICS, SETTINGS, MANIFEST)


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(The tensors of an optimizer's state, all else in it), each as "number of the parameter.name"."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    seen: set[int] = set()
    for name, value in _flat(optimizer.state_dict()["state"]):
        if isinstance(value, DTensor):
            tensors[name] = value
        elif type(value) is Tensor:
            shared = value.data_ptr() in seen  # such as a table that all parameters have
            tensors[name] = value.clone() if shared else value
            seen.add(value.data_ptr())
        else:
            values[name] = value
    return tensors, values


def save_optimizer(optimizer: Any, scheduler: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Write the states of an optimizer and of its learning rate.

    Args:
        optimizer: the optimizer.
        scheduler: of its learning rate.
        tensors: those of its state, whole.
        path: a file to write.

    Raises:
        OSError, SafetensorError: they were not written.
    """
    described = {
        "groups": optimizer.state_dict()["param_groups"],
        "values": optimizer_state(optimizer)[1],
        "scheduler": scheduler.state_dict(),
    }
    save_file(tensors, path, {name: json.dumps(value) for name, value in described.items()})


def load_optimizer(optimizer: Any, scheduler: Any, path: Path) -> None:
    """Give them the states that `save_optimizer` wrote."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {i: {} for i in range(len(parameters))}
    with safe_open(path, framework="pt") as file:
        described: dict[str, Any] = {name: json.loads(value) for name, value in file.metadata().items()}
        flat = described.get("values", {})  # of which an earlier version wrote none
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor, p = file.get_tensor(name), parameters[int(name.partition(".")[0])]
            flat[name] = part_for(tensor, p) if tensor.shape == p.shape else tensor
    for name, value in flat.items():
        number, *way, last = name.split(".")
        within = state[int(number)]
        for part in way:
            within = within.setdefault(part, {})
        within[last] = value
    given = {number: of for number, of in state.items() if of}
    optimizer.load_state_dict({"state": given, "param_groups": described["groups"]})
    scheduler.load_state_dict(described["scheduler"])


def _flat(state: dict[Any, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """(Where it lies, a value) of each in nested dictionaries."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


def save_random(path: Path) -> None:
    """Write the states of Python's, NumPy's and PyTorch's random numbers.

    Raises:
        OSError: they were not written.
    """
    name, numbers, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(numbers).tolist(), *rest),
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    path.write_text(json.dumps(states) + "\n", "utf-8")


def load_random(path: Path) -> None:
    """Go on with the random numbers after those that were drawn before `save_random`."""
    states = json.loads(path.read_bytes())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["torch"])), dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(states["cuda"])), dtype=torch.uint8))


def strangers(folder: Path) -> list[str]:
    """The names of what no run wrote into a checkpoint's folder."""
    return sorted(path.name for path in folder.iterdir() if path.name not in FILES)


def remove(folder: Path) -> None:
    """Remove a checkpoint; what no run wrote stays, and its folder with it.

    Raises:
        OSError: it cannot be removed.
    """
    for name in reversed(FILES):  # the manifest first: half a checkpoint is none
        (folder / name).unlink(missing_ok=True)
    if not strangers(folder):
        folder.rmdir()
