"""Operations of a decoder block, one file each: contract, plain reference, registration, dispatch to a backend."""

from cogsym.ops.activation import activation, activation_gradient, gated_activation, gated_activation_gradients
from cogsym.ops.attention import AttentionOptions, attention, attention_gradients
from cogsym.ops.decode_attention import decode_attention
from cogsym.ops.layer_norm import layer_norm, layer_norm_input_gradient
from cogsym.ops.linear_cross_entropy import linear_cross_entropy, token_scores
from cogsym.ops.rms_norm import rms_norm, rms_norm_input_gradient
from cogsym.ops.rotary import rotary
from cogsym.ops.xielu import xielu, xielu_input_gradient

OPERATIONS = ("rms_norm", "rotary", "gated_activation", "attention", "decode_attention", "linear_cross_entropy")

__all__ = [
    "OPERATIONS",
    "AttentionOptions",
    "activation",
    "activation_gradient",
    "attention",
    "attention_gradients",
    "decode_attention",
    "gated_activation",
    "gated_activation_gradients",
    "layer_norm",
    "layer_norm_input_gradient",
    "linear_cross_entropy",
    "rms_norm",
    "rms_norm_input_gradient",
    "rotary",
    "token_scores",
    "xielu",
    "xielu_input_gradient",
]
