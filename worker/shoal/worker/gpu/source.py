"""A checkpoint's tensors on a device.

They go through two pinned buffers straight to it, one file's pages after the other: the host never
holds more than the buffers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.worker.gpu.device import Device, Event
from shoal.worker.model.weights import WeightSource

STAGING_BYTES = 64 << 20  # of each of the two buffers


class DeviceSource:
    """Another source's tensors, on the device. Implements `WeightSource`."""

    def __init__(self, source: WeightSource, device: Device, staging: int = STAGING_BYTES) -> None:
        self._source = source
        self._device = device
        self._buffers = [device.pinned(staging, torch.uint8) for _ in range(2)]
        self._busy: list[Event | None] = [None, None]  # copies out of the buffers under way
        self._turn = 0

    @property
    def origin(self) -> str:
        return self._source.origin

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._source.shapes

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, name: str) -> Tensor:
        return self.moved(self._source.read(name))

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        return self.moved(self._source.read_runs(name, dim, runs))

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy on the device, queued: the next piece is read while this one is copied. What is
        there already stays as it is."""
        if tensor.device == self._device.home and tensor.device.type != "cpu":
            return tensor
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device.home)
        source = tensor.contiguous().view(-1).view(torch.uint8)
        target = out.view(-1).view(torch.uint8)
        size = len(self._buffers[0])
        for first in range(0, len(source), size):
            piece = source[first : first + size]
            buffer, busy = self._buffers[self._turn], self._busy[self._turn]
            if busy is not None:
                busy.wait()
            buffer[: len(piece)].copy_(piece)
            target[first : first + size].copy_(buffer[: len(piece)], non_blocking=True)
            self._busy[self._turn] = self._device.record()
            self._turn = 1 - self._turn
        return out
