"""A decoder as a step program of the native library: see `shoal.kernels.native`."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.native import (
    Buffer,
    Geometry,
    Into,
    PackedWeight,
    Program,
    Team,
    interleave_gate,
    unavailable,
)
from shoal.kernels.rope import rope_table
from shoal.worker.model.loader import (
    Checkpoint,
    Clock,
    LayerWeights,
    LoadTimes,
    Quantize,
    WeightReader,
)
from shoal.worker.model.precision import Precision
from shoal.worker.model.spec import DecoderSpec

_GATE_ROWS = 16


def unfit(spec: DecoderSpec, precision: Precision, block_size: int) -> str | None:
    """Why step programs cannot serve this model here; None where they can."""
    if (why := unavailable()) is not None:
        return why
    if precision.name != "bfloat16":
        return f"dtype is {precision.name}, and step programs compute in bfloat16"
    if spec.intermediate_size % _GATE_ROWS:
        return f"intermediate size {spec.intermediate_size} is no multiple of {_GATE_ROWS}"
    return geometry(spec, block_size).unfit()


def geometry(spec: DecoderSpec, block_size: int) -> Geometry:
    return Geometry(
        hidden=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary_dim=spec.rope.rotary_dim,
        block_size=block_size,
        scale=spec.head_dim**-0.5,
        window=spec.sliding_window,
    )


class NativeBackend:
    """Implements `shoal.worker.model.backend.Backend`."""

    dtype = "bfloat16"

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        *,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        max_tokens: int,
        threads: int,
        quantize: Quantize | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Reads and packs the weights. `max_tokens`: of a step. `quantize`: what becomes of every
        matrix; None: bfloat16. Raises WeightError, and
        ValueError where `unfit`."""
        if (why := unfit(checkpoint.spec, precision, block_size)) is not None:
            raise ValueError(f"no step program for this model: {why}")
        self.spec = spec = checkpoint.spec
        self.times = LoadTimes()
        self._team = Team(threads)
        self._clock = clock
        self._quantize = quantize
        shape = geometry(spec, block_size)
        self._caches = [shape.cache(num_blocks) for _ in range(spec.num_layers)]
        turns = rope_table(spec.rope.inverse_frequencies(), max_model_len)
        self._step = Program(shape, turns)
        self._head = Program(shape, turns)
        read = WeightReader(checkpoint, precision, clock)
        embedding = read.embedding()
        self._step.embed(embedding)
        for index, cache in enumerate(self._caches):
            self._record(read.layer(index), cache, last=index + 1 == spec.num_layers)
        self._head.norm(read.norm(), spec.rms_eps)
        head = self._pack(read.head(embedding), None)
        self._head.linear(head, Buffer.NORMED, Buffer.LOGITS, Into.FLOAT32)
        self.times.load = read.seconds
        self._buffers = _buffers(spec, max_tokens)

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        self._step.run(self._team, batch, rows, self._buffers)
        return self._buffers[Buffer.RESIDUAL][: len(rows)].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        buffers = list(self._buffers)
        buffers[Buffer.RESIDUAL] = hidden.contiguous()
        buffers[Buffer.LOGITS] = torch.empty(rows, self.spec.vocab_size)
        self._head.run(self._team, _rows_alone(rows), np.zeros(0, np.int64), buffers)
        return buffers[Buffer.LOGITS]

    def clear(self, blocks: Sequence[int]) -> None:
        which = torch.tensor(blocks)
        for cache in self._caches:
            cache.index_fill_(0, which, 0.0)

    def close(self) -> None:
        self._team.close()
        self._caches = []

    def _record(self, layer: LayerWeights, cache: Tensor, *, last: bool) -> None:
        step, eps = self._step, self.spec.rms_eps
        step.norm(layer.attention_norm, eps)
        step.linear(self._pack(*layer.qkv), Buffer.NORMED, Buffer.HEADS, Into.BFLOAT16)
        step.rope_store(cache)
        step.attend(cache)
        if last:
            step.take()
        step.linear(self._pack(*layer.output), Buffer.ATTENDED, Buffer.RESIDUAL, Into.ADD)
        step.norm(layer.mlp_norm, eps)
        (gate, gate_bias), (up, up_bias) = layer.gate, layer.up
        bias = None
        if gate_bias is not None and up_bias is not None:
            bias = interleave_gate(gate_bias, up_bias)
        inner = self._pack(interleave_gate(gate, up), bias)
        step.linear(inner, Buffer.NORMED, Buffer.INNER, Into.GATED)
        step.linear(self._pack(*layer.down), Buffer.INNER, Buffer.RESIDUAL, Into.ADD)

    def _pack(self, weight: Tensor, bias: Tensor | None) -> PackedWeight:
        started = self._clock()
        packed = PackedWeight(self._quantize(weight) if self._quantize else weight, bias)
        self.times.pack += self._clock() - started
        return packed


def _buffers(spec: DecoderSpec, rows: int) -> list[Tensor]:
    """By `Buffer`; logits are allocated for each call, since the sampler keeps them."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    bfloat16 = torch.bfloat16
    return [
        torch.empty(rows, spec.hidden_size),
        torch.empty(rows, spec.hidden_size, dtype=bfloat16),
        torch.empty(rows, heads, dtype=bfloat16),
        torch.empty(rows, spec.num_heads * spec.head_dim, dtype=bfloat16),
        torch.empty(rows, spec.intermediate_size, dtype=bfloat16),
        torch.empty(0),
    ]


def _rows_alone(rows: int) -> FlatBatch:
    """A batch for a program that knows no sequences."""
    none = np.zeros(0, np.int64)
    return FlatBatch(np.zeros(rows, np.int64), none, none, none, none, np.zeros((0, 1), np.int64))
