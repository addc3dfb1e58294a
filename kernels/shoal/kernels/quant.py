"""Weights in 8 bits: a signed byte an element and a scale for every 64 inputs of an output."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # inputs that share a scale


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """`codes * scales`, where a scale holds for GROUP columns."""

    codes: Tensor  # [outputs, inputs] int8
    scales: Tensor  # [outputs, inputs / GROUP] float32

    def dequantized(self) -> Tensor:
        """[outputs, inputs] bfloat16, for backends that do not compute with codes."""
        outputs, inputs = self.codes.shape
        grouped = self.codes.float().view(outputs, -1, GROUP) * self.scales.unsqueeze(2)
        return grouped.view(outputs, inputs).to(torch.bfloat16)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """The nearest codes, symmetric around zero, the largest magnitude of a group at 127.

    weight [outputs, inputs], any float dtype; ValueError where inputs are no multiple of GROUP.
    Activations are not rounded to 8 bits: that loses several percent of the likeliest tokens
    without a treatment of outliers.
    """
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"an int8 weight has {inputs} inputs, expected a multiple of {GROUP}")
    grouped = weight.float().reshape(outputs, -1, GROUP)
    scales = grouped.abs().amax(2) / 127
    # A group of zeros has codes of zero, whatever its scale.
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)
    codes = (grouped / divisors).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(codes.view(outputs, inputs), scales)
