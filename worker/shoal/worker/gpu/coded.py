"""Checkpoints of four-bit matrices that stay codes on the device.

A reader of checkpoints joins and reorders rows of matrices, as each family needs it, and leaves
what is within a row. So it is given, in place of a matrix of codes, the numbers of its rows, and
where these come out says how the codes are to be joined.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.gpu.pack4 import Weight4, from_awq, from_compressed, from_gptq
from shoal.worker.gpu.device import Device
from shoal.worker.model.precision import Precision
from shoal.worker.model.quantized import FourBits, QuantizedSource

_ROWS = 1 << 32  # more than a matrix has
_MIDDLE = 8  # the zero of codes that come without
# What rows' numbers are exact in, and whatever a checkpoint stores as well.
NUMBERS = Precision("rows", torch.float64, torch.float64, torch.float64)


class CodedSource:
    """A quantized source whose four-bit matrices are their rows' numbers, [outputs, 1] float64.
    Implements `WeightSource`."""

    def __init__(self, source: QuantizedSource, device: Device, dtype: torch.dtype) -> None:
        """`dtype`: of a matrix that cannot stay codes after all."""
        self.origin = source.origin
        self.shapes = source.shapes
        self._source = source
        self._device = device
        self._dtype = dtype
        self._names: list[str] = []

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, name: str) -> Tensor:
        if not self._source.has_four_bits(name):
            return self._source.read(name)
        first = _ROWS * len(self._names)
        self._names.append(name)
        rows = torch.arange(first, first + self.shapes[name][0], dtype=torch.float64)
        return rows.unsqueeze(1)

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        assert not self._source.has_four_bits(name), "matrices of codes are read whole"
        return self._source.read_runs(name, dim, runs)

    def joined(self, rows: Tensor) -> Weight4 | Tensor:
        """The matrix whose rows these are, [outputs, 1] as `read` gave them, in any order: as
        codes, or in float where its parts do not go together or kernels do not know their groups.
        """
        owners, places = np.divmod(rows.flatten().long().cpu().numpy(), _ROWS)
        present, which = np.unique(owners, return_inverse=True)
        names = [self._names[owner] for owner in present.tolist()]
        sizes = np.array([self.shapes[name][0] for name in names])
        order = torch.from_numpy((np.cumsum(sizes) - sizes)[which] + places)
        order = order.to(self._device.home)
        parts = [self._matrix(name) for name in names]
        coded = [part for part in parts if isinstance(part, Weight4)]
        if len(coded) < len(parts) or not _alike(coded):
            dense = [part.dequantized() if isinstance(part, Weight4) else part for part in parts]
            return torch.cat([part.to(self._dtype) for part in dense])[order]
        zeros = None
        if any(part.zeros is not None for part in coded):
            zeros = torch.cat([_zeros(part) for part in coded], 1)[:, order].contiguous()
        return Weight4(
            codes=torch.cat([part.codes for part in coded])[order],
            scales=torch.cat([part.scales for part in coded], 1)[:, order].contiguous(),
            zeros=zeros,
            order=coded[0].order,
            inputs=coded[0].inputs,
            group=coded[0].group,
        )

    def _matrix(self, name: str) -> Weight4 | Tensor:
        kind, stored = self._source.four_bits(name)
        home = self._device.home
        try:
            return _packed(kind, {end: part.to(home) for end, part in stored.items()})
        except ValueError:  # groups of a size that no kernel has
            return self._source.read(name).to(home)


def _packed(kind: FourBits, stored: Mapping[str, Tensor]) -> Weight4:
    if kind is FourBits.AWQ:
        return from_awq(stored[".qweight"], stored[".qzeros"], stored[".scales"])
    if kind is FourBits.COMPRESSED:
        return from_compressed(
            stored[".weight_packed"],
            stored[".weight_scale"],
            int(stored[".weight_shape"][1]),
            stored.get(".weight_zero_point"),
            stored.get(".weight_g_idx"),
        )
    return from_gptq(
        stored[".qweight"],
        stored[".qzeros"],
        stored[".scales"],
        stored.get(".g_idx"),
        second_version=kind is FourBits.GPTQ_2,
    )


def _alike(parts: Sequence[Weight4]) -> bool:
    """Whether rows of these may stand in one matrix."""
    first = parts[0]
    return all(
        (part.inputs, part.group) == (first.inputs, first.group)
        and (
            part.order is first.order
            or (
                part.order is not None
                and first.order is not None
                and torch.equal(part.order, first.order)
            )
        )
        for part in parts
    )


def _zeros(part: Weight4) -> Tensor:
    if part.zeros is not None:
        return part.zeros
    return torch.full_like(part.scales, _MIDDLE, dtype=torch.uint8)
