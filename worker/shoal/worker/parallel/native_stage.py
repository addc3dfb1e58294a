"""A rank's layers as step programs of the native library.

A stage of one lane is one program. Where several lanes share the layers, what attention and MLP
add is summed over them, and so a layer is two programs, each of which leaves its share in a buffer
of its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.native import Buffer, Into, Program, Team
from shoal.worker.model.native import (
    LayerPacker,
    geometry,
    norm_weight,
    rope_of,
    rows_alone,
    step_buffers,
)
from shoal.worker.model.packed import PackedLayer
from shoal.worker.model.reader import Checkpoint, WeightReader
from shoal.worker.model.weights import WeightError
from shoal.worker.parallel.part import Part
from shoal.worker.parallel.stage import WEIGHTS_STAY, Exchange

# The float32 buffer that only the head uses: between layers it holds a lane's share.
_SHARE = Buffer.LOGITS
_NOBODY: Ints = np.zeros(0, np.int64)


class NativeStage:
    """Implements `shoal.worker.parallel.stage.StageBackend`."""

    name = "native"
    dtype = "bfloat16"

    def __init__(self, part: Part, exchange: Exchange, num_blocks: int) -> None:
        """Reads and packs the rank's weights."""
        spec, place = part.spec, part.share.place
        self.spec = part.whole
        self.exchange = exchange
        self._part = spec
        self._team = Team(torch.get_num_threads())
        shape = geometry(spec, part.config.block_size)
        self._caches = [shape.cache(num_blocks) for _ in range(spec.num_layers)]
        turns = rope_of(spec).table(part.max_model_len)
        read = WeightReader(Checkpoint(spec, part.source), part.precision)
        pack = LayerPacker(part.quantize)
        tied = place.last and spec.tied_embeddings
        embedding = read.embedding() if place.first or tied else None
        self._embedding = embedding if place.first else None  # [vocab, hidden]
        self._programs: list[Program] = []
        for index, cache in enumerate(self._caches):
            layer = pack.layer(read.layer(index))
            take = place.last and index + 1 == spec.num_layers
            if place.lanes > 1:
                halves = Program(shape, turns), Program(shape, turns)
                self._attend(halves[0], layer, cache, take, _SHARE, Into.FLOAT32)
                self._transform(halves[1], layer, _SHARE, Into.FLOAT32)
                self._programs += halves
                continue
            if not self._programs:
                self._programs = [Program(shape, turns)]
            self._attend(self._programs[0], layer, cache, take, Buffer.RESIDUAL, Into.ADD)
            self._transform(self._programs[0], layer, Buffer.RESIDUAL, Into.ADD)
        self._head = Program(shape, turns)
        if place.last:
            head = pack.matrix(*read.head(embedding))
            self._head.norm(norm_weight(read.norm()), spec.norm_eps)
            self._head.linear(head, Buffer.NORMED, Buffer.LOGITS, Into.FLOAT32)
        self._buffers = step_buffers(spec, part.config.max_batched_tokens)
        if place.lanes > 1:
            self._buffers[_SHARE] = torch.empty_like(self._buffers[Buffer.RESIDUAL])

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        count, last = batch.num_tokens, self.exchange.place.last
        residual = self._buffers[Buffer.RESIDUAL]
        if self.exchange.begins:
            residual[:count] = self.exchange.embedded(torch.from_numpy(batch.ids), self._lookup)
        else:
            residual[:count] = self.exchange.receive(count)
        if self.exchange.place.lanes == 1:
            self._programs[0].run(self._team, batch, rows, self._buffers)
        else:
            self._run_in_lanes(batch, rows)
        if last:
            return residual[: len(rows)].clone()
        self.exchange.pass_on(residual[:count])
        return residual[torch.from_numpy(rows)]

    def gathered_logits(self, hidden: Tensor) -> Tensor | None:
        """hidden [rows, hidden] -> [rows, vocab] on lane 0 of the last stage, None elsewhere."""
        if not self.exchange.place.last:
            return None
        return self.exchange.gathered(self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of this lane's part of the vocabulary."""
        buffers = list(self._buffers)
        buffers[Buffer.RESIDUAL] = hidden.contiguous()
        buffers[Buffer.LOGITS] = torch.empty(len(hidden), self._part.vocab_size)
        self._head.run(self._team, rows_alone(len(hidden)), _NOBODY, buffers)
        return buffers[Buffer.LOGITS]

    def sibling(self, checkpoint: Checkpoint) -> "NativeStage":
        raise WeightError(WEIGHTS_STAY)

    def weights(self) -> object:
        return [program.weights for program in (*self._programs, self._head)]

    def clear(self, blocks: Sequence[int]) -> None:
        which = torch.tensor(blocks)
        for cache in self._caches:
            cache.index_fill_(0, which, 0.0)

    def close(self) -> None:
        self._team.close()
        self._caches = []

    def _lookup(self, ids: Tensor) -> Tensor:
        assert self._embedding is not None, "the first stage embeds"
        return self._embedding.index_select(0, ids).float()

    def _run_in_lanes(self, batch: FlatBatch, rows: Ints) -> None:
        residual, share = self._buffers[Buffer.RESIDUAL], self._buffers[_SHARE]
        count, attends = batch.num_tokens, self._programs[::2]
        for index, (attend, transform) in enumerate(
            zip(attends, self._programs[1::2], strict=True)
        ):
            attend.run(self._team, batch, rows, self._buffers)
            if self.exchange.place.last and index + 1 == len(attends):
                count = len(rows)  # the program has taken them
            residual[:count].add_(self.exchange.sum_(share[:count]))
            transform.run(self._team, rows_alone(count), _NOBODY, self._buffers)
            residual[:count].add_(self.exchange.sum_(share[:count]))

    def _attend(
        self,
        program: Program,
        layer: PackedLayer,
        cache: Tensor,
        take: bool,
        target: Buffer,
        into: Into,
    ) -> None:
        """`take`: from here on only the rows that are asked for."""
        program.norm(layer.attention_norm, self._part.norm_eps)
        program.linear(layer.qkv, Buffer.NORMED, Buffer.HEADS, Into.BFLOAT16)
        program.rope_store(cache)
        program.attend(cache)
        if take:
            program.take()
        program.linear(layer.output, Buffer.ATTENDED, target, into)

    def _transform(self, program: Program, layer: PackedLayer, target: Buffer, into: Into) -> None:
        program.norm(layer.mlp_norm, self._part.norm_eps)
        program.linear(layer.inner, Buffer.NORMED, Buffer.INNER, Into.GATED)
        program.linear(layer.down, Buffer.INNER, target, into)
