"""The functions that launch the Triton kernels, under the names and with the arguments of the plain references."""

from cogsym.kernels.decode_attention import decode_attention
from cogsym.kernels.gated_activation import gated_activation, gated_activation_backward
from cogsym.kernels.linear_cross_entropy import add_rescaled, logits_gradient, online_softmax
from cogsym.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from cogsym.kernels.rotary import rotary

__all__ = [
    "add_rescaled",
    "add_rms_norm",
    "decode_attention",
    "gated_activation",
    "gated_activation_backward",
    "logits_gradient",
    "online_softmax",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
]
