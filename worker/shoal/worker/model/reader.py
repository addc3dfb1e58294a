"""Reads a checkpoint's tensors into the one shape that backends take, whatever its family."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.rope import interleave_halves
from shoal.worker.model.names import Fused
from shoal.worker.model.precision import Precision
from shoal.worker.model.rope import RopeSpec
from shoal.worker.model.spec import (
    DecoderSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    NormKind,
    QkNorm,
    Residual,
)
from shoal.worker.model.weight_map import expected_shapes
from shoal.worker.model.weights import WeightError, WeightSource

Clock = Callable[[], float]
Matrix = tuple[Tensor, Tensor | None]  # weight [outputs, inputs], bias [outputs]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose tables were read, not yet its weights."""

    spec: DecoderSpec
    source: WeightSource


@dataclass(frozen=True, slots=True)
class NormWeights:
    """[hidden] float32, as they are multiplied and added; none where the kind has none."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """Rows of queries and keys pair the elements that turn together, 2i and 2i + 1."""

    qkv: Matrix  # hidden -> (heads + 2 * kv_heads) * head_dim
    query_norm: Tensor | None  # [head_dim] or [heads * head_dim] float32
    key_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """The rotated elements of a head come first."""

    query_down: Matrix | None  # hidden -> query_rank
    query_norm: Tensor | None  # [query_rank] float32
    query_up: Matrix  # query_rank, or hidden -> heads * (rotary_dim + plain_dim)
    kv_down: Matrix  # hidden -> kv_rank + rotary_dim
    kv_norm: Tensor  # [kv_rank] float32
    kv_up: Matrix  # kv_rank -> heads * (plain_dim + value_dim)


@dataclass(frozen=True, slots=True)
class MlpWeights:
    gate: Matrix | None
    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    router: Matrix
    correction: Tensor | None  # [experts] float32
    experts: tuple[MlpWeights, ...]
    shared: MlpWeights | None
    shared_gate: Matrix | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer as read: norms in float32, matrices in the precision's weights."""

    attention_norm: NormWeights | None
    heads: HeadWeights | LatentWeights
    output: Matrix
    attention_post_norm: NormWeights | None
    mlp_norm: NormWeights | None
    mlp: MlpWeights | ExpertWeights
    mlp_post_norm: NormWeights | None


class WeightReader:
    """Reads a checkpoint's tensors, each a copy of its own. `seconds`: what reading took so far.

    Raises WeightError that names the first tensor that is missing, not known, or of a wrong
    shape, before any is read.
    """

    def __init__(
        self, checkpoint: Checkpoint, precision: Precision, clock: Clock = time.perf_counter
    ) -> None:
        self.seconds = 0.0
        self._spec = checkpoint.spec
        self._names = checkpoint.spec.names
        self._source = checkpoint.source
        self._dtype = precision.weights
        self._clock = clock
        check(checkpoint.spec, checkpoint.source)

    def embedding(self) -> Tensor:
        """[vocab, hidden]"""
        return self._read(f"{self._names.top(self._names.embedding)}.weight", self._dtype)

    def positions(self) -> Tensor | None:
        """[learned_positions, hidden]"""
        if self._spec.learned_positions is None:
            return None
        return self._read(f"{self._names.top(self._names.positions)}.weight", self._dtype)

    def norm(self) -> NormWeights:
        """The last norm's."""
        return self._norm(self._names.top(self._names.norm))

    def head(self, embedding: Tensor | None) -> Matrix:
        """[vocab, hidden]: the embedding itself where they are tied."""
        name, spec = self._names.head, self._spec
        weight = embedding
        if not spec.tied_embeddings:
            weight = self._read(f"{name}.weight", self._dtype)
        assert weight is not None, "a tied head is the embedding"
        return weight, self._read(f"{name}.bias", self._dtype) if spec.head_bias else None

    def layer(self, index: int) -> LayerWeights:
        spec, names, prefix = self._spec, self._names, self._names.of_layer(index)
        layer = spec.layers[index]
        pre, post = spec.pre_norm, spec.post_norm
        own = pre and spec.residual is not Residual.PARALLEL_SHARED
        return LayerWeights(
            attention_norm=self._norm(f"{prefix}{names.attention_norm}") if pre else None,
            heads=(
                self._heads(prefix, layer)
                if spec.latent is None
                else self._latent(f"{prefix}self_attn.", spec.latent, layer)
            ),
            output=self._matrix(f"{prefix}{names.output}", spec.output_bias),
            attention_post_norm=(
                self._norm(f"{prefix}{names.attention_post_norm}") if post else None
            ),
            mlp_norm=self._norm(f"{prefix}{names.mlp_norm}") if own else None,
            mlp=self._mlp(prefix, layer),
            mlp_post_norm=self._norm(f"{prefix}{names.mlp_post_norm}") if post else None,
        )

    def _norm(self, name: str) -> NormWeights:
        kind = self._spec.norm
        if kind is NormKind.BARE:
            return NormWeights(None, None)
        weight = self._read(f"{name}.weight", torch.float32)
        if kind is NormKind.RMS_PLUS_ONE:
            weight += 1
        bias = self._read(f"{name}.bias", torch.float32) if kind is NormKind.LAYER else None
        return NormWeights(weight, bias)

    def _heads(self, prefix: str, layer: LayerSpec) -> HeadWeights:
        spec, names = self._spec, self._names
        parts = [self._qkv(prefix, "weight", layer)]
        if spec.attention_bias:
            parts.append(self._qkv(prefix, "bias", layer))
        qkv = (parts[0], parts[1] if spec.attention_bias else None)
        if spec.qk_norm is None:
            return HeadWeights(qkv, None, None)
        query = self._read(f"{prefix}{names.query_norm}.weight", torch.float32)
        key = self._read(f"{prefix}{names.key_norm}.weight", torch.float32)
        if spec.norm is NormKind.RMS_PLUS_ONE:
            query, key = query + 1, key + 1
        each = spec.qk_norm is QkNorm.HEAD
        return HeadWeights(
            qkv,
            _paired(query, 1 if each else spec.num_heads, layer.rope),
            _paired(key, 1 if each else spec.num_kv_heads, layer.rope),
        )

    def _qkv(self, prefix: str, kind: str, layer: LayerSpec) -> Tensor:
        """Rows of queries, keys and values: [outputs, inputs] or [outputs]."""
        spec, names = self._spec, self._names
        if names.fused is None:
            q, k, v = (
                self._rows(f"{prefix}{name}.{kind}")
                for name in (names.queries, names.keys, names.values)
            )
        else:
            fused = self._rows(f"{prefix}{names.fused_name}.{kind}")
            if names.fused is Fused.BY_HEAD:
                by_head = fused.view(spec.num_heads, 3, spec.head_dim, *fused.shape[1:])
                q, k, v = (part.flatten(0, 1) for part in by_head.unbind(1))
            else:
                keys = spec.num_kv_heads * spec.head_dim
                queries = spec.num_heads * spec.head_dim
                q, k, v = fused.tensor_split((queries, queries + keys))
        q = _paired(q, spec.num_heads, layer.rope)
        k = _paired(k, spec.num_kv_heads, layer.rope)
        return torch.cat((q, k, v))

    def _latent(self, prefix: str, latent: LatentSpec, layer: LayerSpec) -> LatentWeights:
        spec = self._spec
        down, norm = None, None
        name = f"{prefix}q_proj"
        if latent.query_rank is not None:
            down = self._matrix(f"{prefix}q_a_proj", spec.attention_bias)
            norm = self._read(f"{prefix}q_a_layernorm.weight", torch.float32)
            name = f"{prefix}q_b_proj"
        queries = self._rows(f"{name}.weight").view(spec.num_heads, spec.head_dim, -1)
        plain, rotary = queries.tensor_split((latent.plain_dim,), dim=1)
        queries = torch.cat((rotary, plain), dim=1).flatten(0, 1)
        kv_down, kv_bias = self._matrix(f"{prefix}kv_a_proj_with_mqa", spec.attention_bias)
        return LatentWeights(
            query_down=down,
            query_norm=norm,
            query_up=(_paired(queries, spec.num_heads, layer.rope), None),
            kv_down=(
                _paired_end(kv_down, latent, layer.rope),
                None if kv_bias is None else _paired_end(kv_bias, latent, layer.rope),
            ),
            kv_norm=self._read(f"{prefix}kv_a_layernorm.weight", torch.float32),
            kv_up=self._matrix(f"{prefix}kv_b_proj", bias=False),
        )

    def _mlp(self, prefix: str, layer: LayerSpec) -> MlpWeights | ExpertWeights:
        spec, names = self._spec, self._names
        if layer.experts:
            assert spec.experts is not None, "layers with experts have a spec of them"
            return self._experts(prefix, spec.experts)
        bias = spec.mlp_bias
        gate: Matrix | None = None
        if spec.gated and names.gate_up is not None:
            both, both_bias = self._matrix(f"{prefix}{names.gate_up}", bias)
            halves = both.chunk(2)
            biases = (None, None) if both_bias is None else both_bias.chunk(2)
            gate, up = (halves[0], biases[0]), (halves[1], biases[1])
        else:
            if spec.gated:
                gate = self._matrix(f"{prefix}{names.gate}", bias)
            up = self._matrix(f"{prefix}{names.up}", bias)
        return MlpWeights(gate, up, self._matrix(f"{prefix}{names.down}", bias))

    def _experts(self, prefix: str, experts: ExpertsSpec) -> ExpertWeights:
        names = self._names
        router = f"{prefix}{names.router}"
        correction = None
        if experts.correction:
            correction = self._read(f"{router}.e_score_correction_bias", torch.float32)
        shared, shared_gate = None, None
        if experts.shared_inner is not None:
            shared = self._gated(f"{prefix}{names.shared}", "gate_proj", "up_proj", "down_proj")
        if experts.shared_gate:
            shared_gate = self._matrix(f"{prefix}{names.shared_gate}", bias=False)
        return ExpertWeights(
            router=self._matrix(router, bias=False),
            correction=correction,
            experts=tuple(
                self._gated(
                    f"{prefix}{names.expert.format(index)}",
                    names.expert_gate,
                    names.expert_up,
                    names.expert_down,
                )
                for index in range(experts.count)
            ),
            shared=shared,
            shared_gate=shared_gate,
        )

    def _gated(self, prefix: str, gate: str, up: str, down: str) -> MlpWeights:
        return MlpWeights(
            *(self._matrix(f"{prefix}{name}", bias=False) for name in (gate, up, down))
        )

    def _matrix(self, name: str, bias: bool) -> Matrix:
        weight = self._rows(f"{name}.weight")
        return weight, self._read(f"{name}.bias", self._dtype) if bias else None

    def _rows(self, name: str) -> Tensor:
        """A layer's matrix as [outputs, inputs], or a bias."""
        tensor = self._read(name, self._dtype)
        return tensor.t() if self._names.transposed and tensor.dim() == 2 else tensor

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        started = self._clock()
        tensor = self._source.read(name).to(dtype, copy=True)
        self.seconds += self._clock() - started
        return tensor


def check(spec: DecoderSpec, source: WeightSource) -> None:
    """Raises WeightError that names the first tensor of the source that is missing, not known, or
    of a wrong shape."""
    expected = expected_shapes(spec)
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            raise WeightError(f"{source.origin}: tensor {name} {list(shape)} is missing")
        if found != shape:
            raise WeightError(
                f"{source.origin}: tensor {name} is {list(found)}, expected {list(shape)}"
            )
    # Old checkpoints store what is computed, and some the tied output a second time.
    derived = (f"{spec.names.head}.weight", *spec.names.ignored)
    spare = tuple(
        spec.names.of_layer(spec.num_layers + index) for index in range(spec.spare_layers)
    )
    for name in source.shapes:
        if name not in expected and not name.endswith(derived) and not name.startswith(spare):
            raise WeightError(
                f"{source.origin}: tensor {name} {list(source.shapes[name])} is not known to "
                f"{spec.architecture}, expected {len(expected)} others"
            )


def _paired(rows: Tensor, heads: int, rope: RopeSpec | None) -> Tensor:
    """Rows of `heads` heads in the order in which the decoder rotates them."""
    if rope is None or rope.interleaved:
        return rows
    return interleave_halves(rows, heads, rope.rotary_dim)


def _paired_end(rows: Tensor, latent: LatentSpec, rope: RopeSpec | None) -> Tensor:
    """`_paired` for the rows of the shared key, which come last."""
    kept, key = rows.tensor_split((latent.kv_rank,))
    return torch.cat((kept, _paired(key, 1, rope)))
