"""What an MLP does between its matrices, and the pairs of matrices it is fused with."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.linear import PackedLinear, gated_silu

Linear = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


# By name, each a function of one tensor of any shape.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu_squared": _relu_squared,
}


def gated(x: Tensor, gate: PackedLinear, up: PackedLinear, activation: str) -> Tensor:
    """`act(gate(x)) * up(x)`: x [rows, in_features] -> [rows, out_features]."""
    if activation == "silu":
        return gated_silu(x, gate, up)
    return ACTIVATIONS[activation](gate(x)).mul_(up(x))
