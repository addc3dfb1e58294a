"""Steps of decodes as graphs: for a few batch sizes, recorded when one is first met.

A step is rounded up to the next size with rows of the slot that is nobody's. A recorded step
reads and writes the buffers here and nothing else of its own, so that a replay needs no host.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.gpu.step_inputs import DecodeRows, relay_drawn
from shoal.worker.gpu.device import Device, Graph
from shoal.worker.gpu.model import DeviceModel
from shoal.worker.gpu.sampler import DeviceSampler, Draw
from shoal.worker.gpu.steps import even

log = logging.getLogger(__name__)


def drawn_of(buffer: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """ids [size] int64 and what became of the rows [size] int32, of a buffer of `Graphs.drawn`'s
    layout."""
    width = even(size)
    return buffer[:size], buffer[width : 2 * width].view(torch.int32)[:size]


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """Work that could not be recorded, and is queued kernel by kernel. Implements `Graph`."""

    run: Callable[[], None]

    def replay(self) -> None:
        self.run()


class Graphs:
    """The buffers of a step of decodes, and the graphs over them."""

    def __init__(
        self,
        model: DeviceModel,
        sampler: DeviceSampler,
        device: Device,
        clock: Callable[[], float],
        sizes: Sequence[int],
    ) -> None:
        """`sizes` rise; the last holds every step."""
        most, state = sizes[-1], model.state
        self.step = torch.zeros(3 * even(most), dtype=torch.int64, device=device.home)
        # ids as int64, and behind them what became of each row as int32
        self.drawn = torch.zeros(2 * even(most), dtype=torch.int64, device=device.home)
        decoder = model.decoder
        self.logits = torch.zeros(
            most, decoder.spec.vocab_size, dtype=decoder.logits_dtype, device=device.home
        )
        self._rows = DecodeRows.allocate(most, state.tables.shape[1], device.home)
        self._model = model
        self._sampler = sampler
        self._device = device
        self._clock = clock
        self._sizes = tuple(sizes)
        self._graphs: dict[tuple[int, Draw | None], Graph] = {}

    def size_for(self, rows: int) -> int:
        return self._sizes[bisect_left(self._sizes, rows)]

    def forward(self, size: int) -> None:
        """The model, over the first `size` rows of `step`: their logits."""
        self._replay(size, None, lambda: self._forward(size))

    def load(self, rows: Tensor, logits: Tensor) -> None:
        """Rows [3, n] and logits [n, vocab] of a step that was no graph, for `draw`."""
        self._step(rows.shape[1]).copy_(rows)
        self.logits[: len(logits)].copy_(logits)

    def draw(self, size: int, kind: Draw, *, graph: bool) -> None:
        """The tokens of `size` rows into `drawn` and the slots' state."""
        if graph and kind is not Draw.LISTED:
            self._replay(size, kind, lambda: self._draw(size, kind))
        else:
            self._draw(size, kind)

    def _step(self, size: int) -> Tensor:
        """[3, size]"""
        width = even(size)
        return self.step[: 3 * width].view(3, width)[:, :size]

    def _replay(self, size: int, kind: Draw | None, run: Callable[[], None]) -> None:
        graph = self._graphs.get((size, kind))
        if graph is not None:
            graph.replay()
            return
        started = self._clock()
        what = "forward pass" if kind is None else f"{kind.value} draw"
        try:
            self._graphs[size, kind] = self._device.capture(run)
        except RuntimeError as error:
            self._device.settle()  # raises where it is the device that failed
            log.warning("the %s of %d rows is not recorded: %s", what, size, error)
            self._graphs[size, kind] = Unrecorded(run)
            run()
            return
        log.info(
            "recorded the %s of %d rows in %.2f s, graph %d",
            what,
            size,
            self._clock() - started,
            len(self._graphs),
        )

    def _forward(self, size: int) -> None:
        step = self._step(size)
        normed = self._model.decode(step, self._rows.first(size))
        self.logits[:size].copy_(self._model.decoder.logits(normed))

    def _draw(self, size: int, kind: Draw) -> None:
        step = self._step(size)
        ids, how = drawn_of(self.drawn, size)
        self._sampler.draw(kind, self.logits[:size], step[0], step[1], ids, how)
        relay_drawn(step, ids, self._model.state)
