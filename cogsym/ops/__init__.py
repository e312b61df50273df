"""Operations of a decoder block, one file each: contract, plain reference, registration, dispatch to a backend."""

from cogsym.ops.gated_activation import gated_activation, gated_activation_gradients
from cogsym.ops.rms_norm import rms_norm, rms_norm_input_gradient
from cogsym.ops.rotary import rotary

OPERATIONS = ("rms_norm", "rotary", "gated_activation")

__all__ = [
    "OPERATIONS",
    "gated_activation",
    "gated_activation_gradients",
    "rms_norm",
    "rms_norm_input_gradient",
    "rotary",
]
