"""cogsym: train the outer layers of a language model, freeze the middle, and see what each layer is for."""

from importlib import import_module
from typing import TYPE_CHECKING

from cogsym.errors import CogsymError, RunStopped

if TYPE_CHECKING:
    from cogsym.models.families import register_family
    from cogsym.ops.operation import register_operation
    from cogsym.plan import LayerPlan
    from cogsym.strategies import register_strategy
    from cogsym.sweeps.layers.actions import register_action
    from cogsym.sweeps.layers.configurations import Configuration
    from cogsym.sweeps.layers.search import register_search
    from cogsym.sweeps.runner import sweep
    from cogsym.sweeps.settings import SweepSettings
    from cogsym.sweeps.tasks.kinds import register_task_kind
    from cogsym.sweeps.tasks.metrics import register_metric
    from cogsym.training.explain import explain
    from cogsym.training.finetune import TrainResult, train
    from cogsym.training.prepare import prepare, restore
    from cogsym.training.settings import TrainSettings
    from cogsym.training.streamed import load_streamed

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
    "load_streamed",
    "prepare",
    "register_action",
    "register_family",
    "register_metric",
    "register_operation",
    "register_search",
    "register_strategy",
    "register_task_kind",
    "restore",
    "sweep",
    "train",
]

# Imported when they are first used: torch and transformers take seconds, for which `cogsym --help` should not wait.
_MODULES = {
    "Configuration": "cogsym.sweeps.layers.configurations",
    "LayerPlan": "cogsym.plan",
    "SweepSettings": "cogsym.sweeps.settings",
    "TrainResult": "cogsym.training.finetune",
    "TrainSettings": "cogsym.training.settings",
    "explain": "cogsym.training.explain",
    "load_streamed": "cogsym.training.streamed",
    "prepare": "cogsym.training.prepare",
    "register_action": "cogsym.sweeps.layers.actions",
    "register_family": "cogsym.models.families",
    "register_metric": "cogsym.sweeps.tasks.metrics",
    "register_operation": "cogsym.ops.operation",
    "register_search": "cogsym.sweeps.layers.search",
    "register_strategy": "cogsym.strategies",
    "register_task_kind": "cogsym.sweeps.tasks.kinds",
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
