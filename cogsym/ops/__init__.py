"""Operations of a decoder block, one file each: contract, plain reference, registration, dispatch to a backend."""

from cogsym.ops.gated_activation import gated_activation
from cogsym.ops.linear_cross_entropy import linear_cross_entropy, token_scores
from cogsym.ops.rms_norm import rms_norm
from cogsym.ops.rotary import rotary

OPERATIONS = ("rms_norm", "rotary", "gated_activation", "linear_cross_entropy")

__all__ = ["OPERATIONS", "gated_activation", "linear_cross_entropy", "rms_norm", "rotary", "token_scores"]
