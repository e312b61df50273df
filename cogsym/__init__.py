"""cogsym: train the outer layers of a language model, freeze the middle, and see what each layer is for."""

from cogsym.errors import CogsymError, RunStopped
from cogsym.plan import LayerPlan
from cogsym.sweeps.configs import Configuration
from cogsym.sweeps.run import SweepSettings, sweep
from cogsym.training.explain import explain
from cogsym.training.prepare import prepare, restore
from cogsym.training.run import TrainResult, TrainSettings, train

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
    "restore",
    "sweep",
    "train",
]
