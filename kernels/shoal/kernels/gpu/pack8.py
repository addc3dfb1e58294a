"""Eight-bit weights: int8 or float8_e4m3fn codes with a scale for each output or each block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS, FP8_LIMIT, GROUP, INT8_LIMIT, SMALLEST

CODES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Weight8:
    """A matrix as codes and scales, `weight = codes * scale`; or one for each expert, with a
    dimension more in front."""

    codes: Tensor  # [outputs, inputs] int8 or float8_e4m3fn
    scales: Tensor  # [outputs], or [ceil(outputs / 128), ceil(inputs / 128)]; float32

    def __post_init__(self) -> None:
        dims = self.codes.dim()
        lead = (None,) * (dims - 2)
        expect("codes", self.codes, (*lead, None, None), CODES, dense=dims)
        *stack, outputs, inputs = self.codes.shape
        shape = (*stack, -(-outputs // GROUP), -(-inputs // GROUP))
        if not self.blocked:
            shape = (*stack, outputs)
        expect("scales", self.scales, shape, torch.float32, dense=len(shape))
        expect_together(codes=self.codes, scales=self.scales)

    @property
    def blocked(self) -> bool:
        """A scale for each 128 x 128 block, not for each output."""
        return self.scales.dim() == self.codes.dim()

    @property
    def kind(self) -> str:
        """As tables of configurations name it."""
        name = "int8" if self.codes.dtype == torch.int8 else "fp8"
        return f"{name}_blocks" if self.blocked else name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return tuple(self.codes.shape)

    def dequantized(self) -> Tensor:
        """[..., outputs, inputs] float32."""
        return self.codes.float() * spread(self.scales, self.shape, self.blocked)


def quantize8(weight: Tensor, dtype: torch.dtype, *, blocked: bool = False) -> Weight8:
    """The nearest codes of int8 or float8_e4m3fn to weight [..., outputs, inputs] of a float
    dtype, the largest magnitude under a scale at the end of the codes' range."""
    if weight.dtype not in FLOATS or dtype not in CODES:
        raise ValueError(
            f"weight is {weight.dtype} and its codes {dtype}, expected a float dtype and "
            "torch.int8 or torch.float8_e4m3fn"
        )
    limit = INT8_LIMIT if dtype == torch.int8 else FP8_LIMIT
    outputs, inputs = weight.shape[-2:]
    exact = weight.float()
    if blocked:
        padded = torch.nn.functional.pad(exact, (0, -inputs % GROUP, 0, -outputs % GROUP))
        tiles = padded.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, GROUP))
        largest = tiles.abs().amax((-3, -1))
    else:
        largest = exact.abs().amax(-1)
    scales = largest.clamp_min(SMALLEST) / limit
    scaled = (exact / spread(scales, weight.shape, blocked)).clamp(-limit, limit)
    return Weight8((scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales)


def spread(scales: Tensor, shape: tuple[int, ...], blocked: bool) -> Tensor:
    """The scales of a weight as they multiply a tensor of its shape."""
    if not blocked:
        return scales.unsqueeze(-1)
    rows = scales.repeat_interleave(GROUP, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(GROUP, -1)[..., : shape[-1]]
