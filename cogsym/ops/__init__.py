"""Operations of a decoder block, one file each: contract, plain reference, registration, dispatch to a backend."""

from cogsym.ops.attention import attention, attention_gradients
from cogsym.ops.decode_attention import decode_attention
from cogsym.ops.gated_activation import gated_activation, gated_activation_gradients
from cogsym.ops.linear_cross_entropy import linear_cross_entropy, token_scores
from cogsym.ops.rms_norm import rms_norm, rms_norm_input_gradient
from cogsym.ops.rotary import rotary

OPERATIONS = ("rms_norm", "rotary", "gated_activation", "attention", "decode_attention", "linear_cross_entropy")

__all__ = [
    "OPERATIONS",
    "attention",
    "attention_gradients",
    "decode_attention",
    "gated_activation",
    "gated_activation_gradients",
    "linear_cross_entropy",
    "rms_norm",
    "rms_norm_input_gradient",
    "rotary",
    "token_scores",
]
