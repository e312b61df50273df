"""cogsym: train the outer layers of a language model, freeze the middle, and see what each layer is for."""

from importlib import import_module
from typing import TYPE_CHECKING

from cogsym.errors import CogsymError, RunStopped

if TYPE_CHECKING:
    from cogsym.plan import LayerPlan
    from cogsym.strategies import register_strategy
    from cogsym.sweeps.layers.configurations import Configuration
    from cogsym.sweeps.runner import SweepSettings, sweep
    from cogsym.training.explain import explain
    from cogsym.training.finetune import TrainResult, train
    from cogsym.training.prepare import prepare, restore
    from cogsym.training.settings import TrainSettings

__version__ = "0.1.0"

__all__ = [
    "CogsymError",
    "Configuration",
    "LayerPlan",
    "RunStopped",
    "SweepSettings",
    "TrainResult",
    "TrainSettings",
    "explain",
    "prepare",
    "register_strategy",
    "restore",
    "sweep",
    "train",
]

# Imported when they are first used: torch and transformers take seconds, for which `cogsym --help` should not wait.
_MODULES = {
    "Configuration": "cogsym.sweeps.layers.configurations",
    "LayerPlan": "cogsym.plan",
    "SweepSettings": "cogsym.sweeps.runner",
    "TrainResult": "cogsym.training.finetune",
    "TrainSettings": "cogsym.training.settings",
    "explain": "cogsym.training.explain",
    "prepare": "cogsym.training.prepare",
    "register_strategy": "cogsym.strategies",
    "restore": "cogsym.training.prepare",
    "sweep": "cogsym.sweeps.runner",
    "train": "cogsym.training.finetune",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
