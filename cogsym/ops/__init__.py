"""Operations of a decoder block, one file each: contract, plain reference, registration, dispatch to a backend."""

from cogsym.ops.attention import attention
from cogsym.ops.gated_activation import gated_activation
from cogsym.ops.rms_norm import rms_norm
from cogsym.ops.rotary import rotary

OPERATIONS = ("rms_norm", "rotary", "gated_activation", "attention")

__all__ = ["OPERATIONS", "attention", "gated_activation", "rms_norm", "rotary"]
