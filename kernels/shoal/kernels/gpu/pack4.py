"""Four-bit weights in one layout, whichever format they were stored in.

A group of inputs of one output shares a scale and a zero: `weight = (code - zero) * scale`, codes
from 0 to 15. Inputs come in chunks of two halves, 64 + 64 (32 + 32 with groups of 32); byte j of
a chunk holds the code of input j in its low nibble and that of input j of the second half in its
high one. So a tile of bytes is two tiles of codes, each with consecutive inputs, and a kernel
multiplies one after the other without putting nibbles side by side; and each half lies within a
group.

    codes   [outputs, chunks * half] uint8
    scales  [groups, outputs]        of a float dtype, so that a tile reads neighbours
    zeros   [groups, outputs] uint8  or None: 8 everywhere
    order   [inputs] int32           or None: input `order[i]` of x meets column i (act-order)

Checkpoints: GPTQ (Frantar et al., 2022), AWQ (Lin et al., 2023), compressed-tensors' packs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS

GROUPS = (32, 64, 128)  # inputs of a group, if not all of them
_MIDDLE = 8
_NIBBLES = range(0, 32, 4)  # shifts of the nibbles of an int32 word
# Column of an AWQ word's nibbles, lowest first, is 0 2 4 6 1 3 5 7; this is the way back.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class Weight4:
    """A matrix [outputs, inputs], or one for each expert with a dimension more in front."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    inputs: int
    group: int  # inputs of a group: 32, 64, 128, or `inputs`

    def __post_init__(self) -> None:
        if self.group not in (*GROUPS, self.inputs) or self.inputs % self.group:
            raise ValueError(
                f"group is {self.group} for {self.inputs} inputs, expected "
                f"{', '.join(map(str, GROUPS))} or all of them, without a rest"
            )
        lead = (None,) * (self.codes.dim() - 2)
        dense = self.codes.dim()
        expect("codes", self.codes, (*lead, None, self.row_bytes), torch.uint8, dense=dense)
        *stack, outputs, _ = self.codes.shape
        shape = (*stack, self.inputs // self.group, outputs)
        expect("scales", self.scales, shape, FLOATS, dense=dense)
        together = {"codes": self.codes, "scales": self.scales}
        if self.zeros is not None:
            expect("zeros", self.zeros, shape, torch.uint8, dense=dense)
            together["zeros"] = self.zeros
        if self.order is not None:
            expect("order", self.order, (self.inputs,), torch.int32)
            together["order"] = self.order
        expect_together(**together)

    @property
    def half(self) -> int:
        """Inputs of half a chunk."""
        return 32 if self.group == 32 else 64

    @property
    def chunks(self) -> int:
        return -(-self.inputs // (2 * self.half))

    @property
    def group_chunks(self) -> int:
        """Chunks of a group; one where a group is half a chunk."""
        return -(-self.group // (2 * self.half))

    @property
    def halved(self) -> bool:
        """A group is half a chunk."""
        return self.group == self.half

    @property
    def even(self) -> bool:
        """Inputs fill the chunks."""
        return self.inputs % (2 * self.half) == 0

    @property
    def row_bytes(self) -> int:
        """Of an output's codes."""
        return self.chunks * self.half

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices."""
        return (*self.codes.shape[:-1], self.inputs)

    def dequantized(self) -> Tensor:
        """[..., outputs, inputs] float32, columns where the checkpoint had them."""
        split = self.codes.unflatten(-1, (self.chunks, self.half))
        codes = torch.cat([split & 15, split >> 4], -1).flatten(-2)[..., : self.inputs].float()
        zeros = _MIDDLE if self.zeros is None else self._spread(self.zeros.float())
        weight = (codes - zeros) * self._spread(self.scales.float())
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(-1, self.order.long(), weight)

    def _spread(self, groups: Tensor) -> Tensor:
        """[..., groups, outputs] -> [..., outputs, inputs]."""
        return groups.transpose(-1, -2).repeat_interleave(self.group, -1)


def pack4(codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None) -> Weight4:
    """codes [outputs, inputs] from 0 to 15; scales and zeros [groups, outputs]; order [inputs].
    Raises ValueError for groups that no kernel knows."""
    outputs, inputs = codes.shape
    group = inputs // len(scales)
    half = 32 if group == 32 else 64
    filled = torch.nn.functional.pad(
        codes.to(torch.uint8), (0, -inputs % (2 * half)), value=_MIDDLE
    )
    chunks = filled.view(outputs, -1, 2, half)
    return Weight4(
        codes=(chunks[:, :, 0] | chunks[:, :, 1] << 4).flatten(1).contiguous(),
        scales=scales.contiguous(),
        zeros=None if zeros is None else zeros.to(torch.uint8).contiguous(),
        order=None if order is None else order.to(torch.int32).contiguous(),
        inputs=inputs,
        group=group,
    )


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    second_version: bool = False,
) -> Weight4:
    """A GPTQ layer: qweight [inputs / 8, outputs] and qzeros [groups, outputs / 8] int32, scales
    [groups, outputs], g_idx [inputs] the group of each input. Zeros are stored one too small,
    except in the second version of the format. Raises ValueError where g_idx gives groups of
    several sizes, as when the inputs were cut."""
    codes = _nibbles(qweight, 0)  # [inputs, outputs]
    zeros = (_nibbles(qzeros, 1) + (0 if second_version else 1)) & 15
    order = None
    if g_idx is not None:
        order = _by_group(g_idx, len(scales))
        codes = codes if order is None else codes[order]
    return pack4(codes.t(), scales, zeros[:, : codes.shape[1]], order)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Weight4:
    """An AWQ layer of the `gemm` layout: qweight [inputs, outputs / 8] and qzeros
    [groups, outputs / 8] int32, scales [groups, outputs]."""

    def columns(words: Tensor) -> Tensor:
        nibbles = _nibbles(words, 1).view(len(words), -1, 8)
        return nibbles[:, :, list(_AWQ_ORDER)].flatten(1)

    return pack4(columns(qweight).t(), scales, columns(qzeros), None)


def from_compressed(
    packed: Tensor,
    scales: Tensor,
    inputs: int,
    zeros: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Weight4:
    """A `pack-quantized` layer of compressed-tensors: packed [outputs, inputs / 8] int32, scales
    [outputs, groups], zeros [outputs / 8, groups] int32, g_idx [inputs] or -1 throughout."""
    codes = _nibbles(packed, 1)[:, :inputs]
    order = None
    if g_idx is not None and not bool((g_idx < 0).any()):
        order = _by_group(g_idx, scales.shape[1])
        codes = codes if order is None else codes[:, order]
    points = None if zeros is None else _nibbles(zeros, 0)[: len(codes)].t()
    return pack4(codes, scales.t(), points, order)


def quantize4(weight: Tensor, group: int) -> Weight4:
    """The nearest codes to weight [outputs, inputs] of a float dtype, zeros in the middle; group:
    32, 64, 128 or all inputs. Scales are of the weight's dtype."""
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, inputs // group, group)
    scales = (grouped.abs().amax(-1).clamp_min(1e-6) / 7).to(weight.dtype)
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7) + _MIDDLE
    return pack4(codes.view(outputs, inputs), scales.t(), None, None)


def stack4(weights: Sequence[Weight4]) -> Weight4:
    """Matrices of equal shape and groups as one of experts; none may have an order of inputs."""
    first = weights[0]
    if any(weight.order is not None for weight in weights):
        raise ValueError("experts with act-order cannot be stacked: each has its own order")
    with_zeros = [
        torch.full_like(weight.scales, _MIDDLE, dtype=torch.uint8)
        if weight.zeros is None
        else weight.zeros
        for weight in weights
    ]
    plain = all(weight.zeros is None for weight in weights)
    return Weight4(
        codes=torch.stack([weight.codes for weight in weights]),
        scales=torch.stack([weight.scales for weight in weights]),
        zeros=None if plain else torch.stack(with_zeros),
        order=None,
        inputs=first.inputs,
        group=first.group,
    )


def _nibbles(words: Tensor, dim: int) -> Tensor:
    """The codes of int32 words along a dimension, lowest first."""
    shifts = torch.tensor(_NIBBLES, dtype=torch.int32, device=words.device)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = len(_NIBBLES)
    codes = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & 15
    return codes.flatten(dim, dim + 1)


def _by_group(g_idx: Tensor, groups: int) -> Tensor | None:
    """The order that brings the inputs of a group together; None where they are already."""
    order = g_idx.long().argsort(stable=True)
    size = len(g_idx) // groups
    expected = torch.arange(len(g_idx), device=g_idx.device) // size
    if not torch.equal(g_idx[order].long(), expected):
        raise ValueError(
            f"g_idx does not put {size} of {len(g_idx)} inputs in each of {groups} groups: "
            "groups of several sizes are not supported, keep the inputs of a layer whole"
        )
    return None if torch.equal(g_idx.long(), expected) else order
