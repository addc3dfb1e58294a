"""Who computes a step: a model with its KV cache, behind the few calls that the executor makes."""

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.paged import CacheShape, plan_batch
from shoal.worker.host import threads_for
from shoal.worker.model.decoder import Decoder, LayerInputs
from shoal.worker.model.loader import Quantize, load_decoder
from shoal.worker.model.reader import Checkpoint
from shoal.worker.model.spec import DecoderSpec


class Backend(Protocol):
    """Used by one thread, under torch.inference_mode."""

    @property
    def spec(self) -> DecoderSpec: ...

    @property
    def dtype(self) -> str:
        """As in EngineConfig.dtype."""
        ...

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        """Stores the keys and values of the batch's tokens and returns the hidden states, before
        the last norm, of the flat `rows`: [rows, hidden] float32. Sequences come in
        `shoal.kernels.paged.flat_order`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] float32, as `forward` returns it -> [rows, vocab] float32."""
        ...

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes the keys and values of these blocks."""
        ...

    def sibling(self, checkpoint: Checkpoint) -> "Backend":
        """Other weights of an equal spec over the same caches, threads and buffers. Any thread
        may make one; raises WeightError."""
        ...

    def weights(self) -> object:
        """What holds the weights as they lie in memory: see `shoal.worker.model.fingerprint`."""
        ...

    def close(self) -> None:
        """Lets go of memory and threads, those shared with siblings included."""
        ...


class TorchBackend:
    """Torch's operations, one by one: for every dtype and processor, and the native's oracle."""

    def __init__(
        self,
        decoder: Decoder,
        shape: CacheShape,
        max_model_len: int,
        quantize: Quantize | None = None,
    ) -> None:
        """`quantize`: what the decoder's matrices went through, and a sibling's will."""
        self.spec = decoder.spec
        self.dtype = decoder.precision.name
        self._decoder = decoder
        self._shape = shape
        self._quantize = quantize
        self._threads = torch.get_num_threads()
        self._caches = [shape.allocate(decoder.precision.cache) for _ in decoder.layers]
        self._ropes = {rope: rope.table(max_model_len) for rope in decoder.spec.ropes}

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        torch.set_num_threads(threads_for(len(batch.ids), self._threads))
        positions = torch.from_numpy(batch.positions)
        return self._decoder.forward(
            torch.from_numpy(batch.ids), positions, self.inputs(batch), torch.from_numpy(rows)
        )

    def inputs(self, batch: FlatBatch) -> LayerInputs:
        """What a step's layers share."""
        compute, positions = self._decoder.precision.compute, torch.from_numpy(batch.positions)
        return LayerInputs(
            turns={rope: table.index_select(0, positions) for rope, table in self._ropes.items()},
            batches={
                window: plan_batch(
                    batch.start, batch.count, batch.tables, self._shape, compute, window
                )
                for window in self.spec.windows
            },
            caches=self._caches,
            shape=self._shape,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)

    def clear(self, blocks: Sequence[int]) -> None:
        which = torch.tensor(blocks)
        for cache in self._caches:
            by_block = cache.view(2 * self._shape.kv_heads, self._shape.num_blocks, -1)
            by_block.index_fill_(1, which, 0.0)

    def sibling(self, checkpoint: Checkpoint) -> "TorchBackend":
        other = copy(self)
        other._decoder, _ = load_decoder(
            checkpoint, self._decoder.precision, quantize=self._quantize
        )
        return other

    def weights(self) -> object:
        return self._decoder

    def close(self) -> None:
        self._caches = []
