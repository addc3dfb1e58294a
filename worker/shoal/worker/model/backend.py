"""Who computes a step: a model with its KV cache, behind the few calls that the executor makes."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.paged import CacheShape, plan_batch
from shoal.kernels.rope import rope_table
from shoal.worker.model.decoder import Decoder
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

    def close(self) -> None:
        """Lets go of memory and threads."""
        ...


class TorchBackend:
    """Torch's operations, one by one: for every dtype and processor, and the native's oracle."""

    def __init__(self, decoder: Decoder, shape: CacheShape, max_model_len: int) -> None:
        self.spec = decoder.spec
        self.dtype = decoder.precision.name
        self._decoder = decoder
        self._shape = shape
        self._caches = [shape.allocate(decoder.precision.cache) for _ in decoder.layers]
        self._rope = rope_table(decoder.spec.rope.inverse_frequencies(), max_model_len)

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        compute, window = self._decoder.precision.compute, self.spec.sliding_window
        paged = plan_batch(batch.start, batch.count, batch.tables, self._shape, compute, window)
        return self._decoder.forward(
            torch.from_numpy(batch.ids),
            self._rope.index_select(0, torch.from_numpy(batch.positions)),
            paged,
            self._caches,
            self._shape,
            torch.from_numpy(rows),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)

    def clear(self, blocks: Sequence[int]) -> None:
        which = torch.tensor(blocks)
        for cache in self._caches:
            by_block = cache.view(2 * self._shape.kv_heads, self._shape.num_blocks, -1)
            by_block.index_fill_(1, which, 0.0)

    def close(self) -> None:
        self._caches = []
