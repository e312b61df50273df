"""Operations of a decoder block, one file each: contract, plain reference, calls of the kernels, declaration.

A new one is cogsym/ops/<operation>.py with all of these, csrc/<operation>.cpp and kernels/<operation>.py with its
kernels, each where there is one, its tests, and its public function below. Whatever lists operations reads the
declaration: dispatch, `cogsym info`, `cogsym bench`, `explain`, the checks in tests/ops/test_operation.py, the kernels
that are compiled ahead of time, the counts of the guard. The extension's stub and the guard's table are written anew by
`python tests/ops/stub.py` and `python tests/guard/measures.py`. Another package declares its own: see
`cogsym.ops.operation`.
"""

from cogsym.ops.activation import activation, activation_gradient, gated_activation, gated_activation_gradients
from cogsym.ops.attention import attention, attention_gradients
from cogsym.ops.attention_inputs import AttentionOptions
from cogsym.ops.decode_attention import decode_attention
from cogsym.ops.int8_linear import int8_linear, int8_linear_input_gradient
from cogsym.ops.layer_norm import layer_norm, layer_norm_input_gradient
from cogsym.ops.linear import linear, linear_input_gradient
from cogsym.ops.linear_cross_entropy import linear_cross_entropy, token_scores
from cogsym.ops.operation import Operation, Route, operations, register_operation, route
from cogsym.ops.rms_norm import rms_norm, rms_norm_input_gradient
from cogsym.ops.rotary import rotary
from cogsym.ops.xielu import xielu, xielu_input_gradient

__all__ = [
    "AttentionOptions",
    "Operation",
    "Route",
    "activation",
    "activation_gradient",
    "attention",
    "attention_gradients",
    "decode_attention",
    "gated_activation",
    "gated_activation_gradients",
    "int8_linear",
    "int8_linear_input_gradient",
    "layer_norm",
    "layer_norm_input_gradient",
    "linear",
    "linear_cross_entropy",
    "linear_input_gradient",
    "operations",
    "register_operation",
    "rms_norm",
    "rms_norm_input_gradient",
    "rotary",
    "route",
    "token_scores",
    "xielu",
    "xielu_input_gradient",
]
