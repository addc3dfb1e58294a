"""A decoder as a step program of the native library: see `shoal.kernels.native`."""

import threading
import time
from collections.abc import Sequence
from copy import copy

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
from shoal.worker.model.loader import LoadTimes, Quantize
from shoal.worker.model.packed import PackedLayer, PackedModel, PackedStore
from shoal.worker.model.precision import Precision
from shoal.worker.model.reader import (
    Checkpoint,
    Clock,
    HeadWeights,
    LayerWeights,
    MlpWeights,
    NormWeights,
    WeightReader,
)
from shoal.worker.model.rope import RopeSpec
from shoal.worker.model.spec import Activation, DecoderSpec, NormKind, Residual

_GATE_ROWS = 16


def unfit(spec: DecoderSpec, precision: Precision, block_size: int) -> str | None:
    """Why step programs cannot serve this model here; None where they can."""
    if (why := unavailable()) is not None:
        return why
    if precision.name != "bfloat16":
        return f"dtype is {precision.name}, and step programs compute in bfloat16"
    if (what := foreign_parts(spec)) is not None:
        return f"step programs do not know {what}"
    if spec.intermediate_size % _GATE_ROWS:
        return f"intermediate size {spec.intermediate_size} is no multiple of {_GATE_ROWS}"
    return geometry(spec, block_size).unfit()


def foreign_parts(spec: DecoderSpec) -> str | None:
    """What the model has that step programs do not; None where they know all of it."""
    known = (
        ("norms other than RMS norm", spec.norm in (NormKind.RMS, NormKind.RMS_PLUS_ONE)),
        ("norms behind attention or MLP", spec.pre_norm and not spec.post_norm),
        ("a parallel MLP", spec.residual is Residual.SEQUENTIAL),
        ("norms of queries and keys", spec.qk_norm is None),
        ("bounds on queries, keys and values", spec.clip_qkv is None),
        ("an MLP without SiLU and gate", spec.gated and spec.activation is Activation.SILU),
        ("experts", spec.experts is None),
        ("latent attention", spec.latent is None),
        ("soft caps", spec.attention_softcap is None and spec.logit_softcap is None),
        ("scaled embeddings", spec.embedding_scale == 1.0),
        ("scaled residuals", spec.residual_scale == 1.0),
        ("scaled logits", spec.logit_scale == 1.0),
        ("learned positions", spec.learned_positions is None),
        ("layers without rotation", all(layer.rope is not None for layer in spec.layers)),
        ("layers that differ in rotation or window", len(set(spec.layers)) == 1),
    )
    return next((what for what, fits in known if not fits), None)


def geometry(spec: DecoderSpec, block_size: int) -> Geometry:
    """Of a model whose layers are all alike."""
    return Geometry(
        hidden=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary_dim=rope_of(spec).rotary_dim,
        block_size=block_size,
        scale=spec.score_scale,
        window=spec.layers[0].window,
    )


def rope_of(spec: DecoderSpec) -> RopeSpec:
    """That of all layers."""
    rope = spec.layers[0].rope
    assert rope is not None, "step programs rotate in every layer"
    return rope


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
        store: PackedStore | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Reads and packs the weights, or maps them where `store` has them. `max_tokens`: of a
        step. `quantize`: what becomes of every matrix; None: bfloat16. Raises WeightError, and
        ValueError where `unfit`."""
        if (why := unfit(checkpoint.spec, precision, block_size)) is not None:
            raise ValueError(f"no step program for this model: {why}")
        self.spec = spec = checkpoint.spec
        self.times = LoadTimes()
        self._team = Team(threads)
        self._clock = clock
        self._quantize = quantize
        self._precision = precision
        self._geometry = geometry(spec, block_size)
        self._caches = [self._geometry.cache(num_blocks) for _ in range(spec.num_layers)]
        self._turns = rope_of(spec).table(max_model_len)
        self._buffers = step_buffers(spec, max_tokens)
        model = store.load() if store is not None else None
        self.mapped = model is not None
        if model is None:
            model = self._packed(checkpoint)
            if store is not None:
                _save(store, model)
        self._record_all(model)

    def _packed(self, checkpoint: Checkpoint) -> PackedModel:
        """Reads the weights, and packs each as soon as it is read."""
        read = WeightReader(checkpoint, self._precision, self._clock)
        embedding = read.embedding()
        pack = LayerPacker(self._quantize, self._clock)
        layers = tuple(pack.layer(read.layer(index)) for index in range(self.spec.num_layers))
        norm, head = norm_weight(read.norm()), pack.matrix(*read.head(embedding))
        self.times.load, self.times.pack = read.seconds, pack.seconds
        return PackedModel(embedding, layers, norm, head)

    def _record_all(self, model: PackedModel) -> None:
        """Makes the programs that compute with these weights."""
        self._step = Program(self._geometry, self._turns)
        self._head = Program(self._geometry, self._turns)
        self._step.embed(model.embedding)
        for layer, cache in zip(model.layers, self._caches, strict=True):
            self._record(layer, cache, last=layer is model.layers[-1])
        self._head.norm(model.norm, self.spec.norm_eps)
        self._head.linear(model.head, Buffer.NORMED, Buffer.LOGITS, Into.FLOAT32)

    def forward(self, batch: FlatBatch, rows: Ints) -> Tensor:
        self._step.run(self._team, batch, rows, self._buffers)
        return self._buffers[Buffer.RESIDUAL][: len(rows)].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        rows = len(hidden)
        buffers = list(self._buffers)
        buffers[Buffer.RESIDUAL] = hidden.contiguous()
        buffers[Buffer.LOGITS] = torch.empty(rows, self.spec.vocab_size)
        self._head.run(self._team, rows_alone(rows), np.zeros(0, np.int64), buffers)
        return buffers[Buffer.LOGITS]

    def clear(self, blocks: Sequence[int]) -> None:
        which = torch.tensor(blocks)
        for cache in self._caches:
            cache.index_fill_(0, which, 0.0)

    def sibling(self, checkpoint: Checkpoint) -> "NativeBackend":
        other = copy(self)
        other.times = LoadTimes()
        other.mapped = False
        other._record_all(other._packed(checkpoint))
        return other

    def weights(self) -> object:
        return {"step": self._step.weights, "head": self._head.weights}

    def close(self) -> None:
        self._team.close()
        self._caches = []

    def _record(self, layer: PackedLayer, cache: Tensor, *, last: bool) -> None:
        step, eps = self._step, self.spec.norm_eps
        step.norm(layer.attention_norm, eps)
        step.linear(layer.qkv, Buffer.NORMED, Buffer.HEADS, Into.BFLOAT16)
        step.rope_store(cache)
        step.attend(cache)
        if last:
            step.take()
        step.linear(layer.output, Buffer.ATTENDED, Buffer.RESIDUAL, Into.ADD)
        step.norm(layer.mlp_norm, eps)
        step.linear(layer.inner, Buffer.NORMED, Buffer.INNER, Into.GATED)
        step.linear(layer.down, Buffer.INNER, Buffer.RESIDUAL, Into.ADD)


class LayerPacker:
    """Packs matrices as step programs want them. `seconds`: what that took so far."""

    def __init__(self, quantize: Quantize | None, clock: Clock = time.perf_counter) -> None:
        self.seconds = 0.0
        self._quantize = quantize
        self._clock = clock

    def layer(self, layer: LayerWeights) -> PackedLayer:
        assert isinstance(layer.heads, HeadWeights) and isinstance(layer.mlp, MlpWeights)
        assert layer.mlp.gate is not None, "step programs have gated MLPs"
        (gate, gate_bias), (up, up_bias) = layer.mlp.gate, layer.mlp.up
        bias = None
        if gate_bias is not None and up_bias is not None:
            bias = interleave_gate(gate_bias, up_bias)
        return PackedLayer(
            attention_norm=norm_weight(layer.attention_norm),
            qkv=self.matrix(*layer.heads.qkv),
            output=self.matrix(*layer.output),
            mlp_norm=norm_weight(layer.mlp_norm),
            inner=self.matrix(interleave_gate(gate, up), bias),
            down=self.matrix(*layer.mlp.down),
        )

    def matrix(self, weight: Tensor, bias: Tensor | None) -> PackedWeight:
        started = self._clock()
        packed = PackedWeight(self._quantize(weight) if self._quantize else weight, bias)
        self.seconds += self._clock() - started
        return packed


def _save(store: PackedStore, model: PackedModel) -> None:
    """Beside the start, which need not wait for the volume; the process may end before it is done,
    and then the next one does it."""
    threading.Thread(target=store.save, args=(model,), name="packed weights", daemon=True).start()


def norm_weight(norm: NormWeights | None) -> Tensor:
    """[hidden] float32"""
    assert norm is not None and norm.weight is not None, "step programs norm before each part"
    return norm.weight


def step_buffers(spec: DecoderSpec, rows: int) -> list[Tensor]:
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


def rows_alone(rows: int) -> FlatBatch:
    """A batch for a program that knows no sequences."""
    none = np.zeros(0, np.int64)
    return FlatBatch(np.zeros(rows, np.int64), none, none, none, none, np.zeros((0, 1), np.int64))
