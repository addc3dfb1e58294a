"""The parts of a decoder's layers on a device, each a few kernels over the rows of a step.

Nothing here waits for the device or reads what it computes, and whatever differs from one step to
the next comes in tensors: a step can be recorded as a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.experts import Routing, route
from shoal.kernels.gpu.activation import activated, gated
from shoal.kernels.gpu.attention import AttentionBatch
from shoal.kernels.gpu.experts import mix_experts
from shoal.kernels.gpu.heads import HeadNorms, store_heads_
from shoal.kernels.gpu.kv_cache import KvCache, store_kv
from shoal.kernels.gpu.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    norm_heads_,
    rms_norm,
)
from shoal.kernels.gpu.pack4 import Weight4
from shoal.kernels.gpu.rope import apply_rope_
from shoal.worker.model.layers import LATENT_EPS
from shoal.worker.model.spec import DecoderSpec, LatentSpec, LayerSpec, NormKind, QkNorm

Linear = Callable[[Tensor], Tensor]  # [rows, inputs] -> [rows, outputs], of the same dtype


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the layers of one step share."""

    positions: Tensor  # [tokens] int64, within their sequences
    places: Tensor  # [tokens] int64: block * block_size + offset of their KV; negative: nowhere
    batch: AttentionBatch


@dataclass(frozen=True, slots=True)
class Dense:
    """`y = x W^T + b` by the library of the device's maker."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None  # [outputs]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class DeviceNorm:
    """A norm over rows of the residual, or of what is added to it."""

    kind: NormKind
    weight: Tensor | None  # [hidden] float32, one already added where it is stored around zero
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor, out: torch.dtype) -> Tensor:
        """x [rows, hidden] -> the same shape, in `out`."""
        if self.kind in (NormKind.RMS, NormKind.RMS_PLUS_ONE):
            assert self.weight is not None, "these norms have weights"
            return rms_norm(x, self.weight, self.eps, out)
        return layer_norm(x, self.weight, self.bias, self.eps, out)

    def after_adding(self, residual: Tensor, delta: Tensor, out: torch.dtype) -> Tensor:
        """Adds `delta` to the residual in place, and norms the sum."""
        if self.kind in (NormKind.RMS, NormKind.RMS_PLUS_ONE):
            assert self.weight is not None, "these norms have weights"
            return add_rms_norm(residual, delta, self.weight, self.eps, out)
        return add_layer_norm(residual, delta, self.weight, self.bias, self.eps, out)


class Heads(Protocol):
    def __call__(self, x: Tensor, turns: Tensor | None, step: StepInputs, cache: KvCache) -> Tensor:
        """Queries, keys and values of each token, normed and rotated; the latter two go to the
        cache.

        x [tokens, hidden]; turns [positions, rotary_dim] float32, none where the layer does not
        see positions -> queries [tokens, heads, head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class ProjectedHeads:
    spec: DecoderSpec
    qkv: Linear  # hidden -> (heads + 2 * kv_heads) * head_dim, rotary pairs interleaved
    query_norm: Tensor | None  # [head_dim] or [heads * head_dim] float32
    key_norm: Tensor | None

    def __call__(self, x: Tensor, turns: Tensor | None, step: StepInputs, cache: KvCache) -> Tensor:
        spec = self.spec
        heads = self.qkv(x).view(len(x), -1, spec.head_dim)
        norms = None
        if self.query_norm is not None and self.key_norm is not None:
            if spec.qk_norm is QkNorm.HEAD and spec.clip_qkv is None:
                norms = HeadNorms(self.query_norm, self.key_norm, spec.norm_eps)
            else:
                rotated = spec.num_heads + spec.num_kv_heads
                _norm_(heads[:, : spec.num_heads], self.query_norm, spec.norm_eps)
                _norm_(heads[:, spec.num_heads : rotated], self.key_norm, spec.norm_eps)
        if spec.clip_qkv is not None:
            heads.clamp_(-spec.clip_qkv, spec.clip_qkv)
        return store_heads_(
            heads,
            cache,
            step.places,
            norms=norms,
            table=turns,
            positions=None if turns is None else step.positions,
        )


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """Latent attention, its keys and values expanded: the cache holds what every head sees."""

    spec: DecoderSpec
    latent: LatentSpec
    query_down: Linear | None
    query_norm: Tensor | None  # [query_rank] float32
    query_up: Linear  # -> heads * (rotary_dim + plain_dim)
    kv_down: Linear  # hidden -> kv_rank + rotary_dim
    kv_norm: Tensor  # [kv_rank] float32
    kv_up: Linear  # kv_rank -> heads * (plain_dim + value_dim)

    def __call__(self, x: Tensor, turns: Tensor | None, step: StepInputs, cache: KvCache) -> Tensor:
        assert turns is not None, "latent attention rotates in every layer"
        latent, count, heads = self.latent, len(x), self.spec.num_heads
        rotary, positions = latent.rotary_dim, step.positions
        narrow = x
        if self.query_down is not None and self.query_norm is not None:
            narrow = rms_norm(self.query_down(x), self.query_norm, LATENT_EPS, x.dtype)
        out = torch.zeros(count, 3 * heads, self.spec.head_dim, dtype=x.dtype, device=x.device)
        queries, keys, values = out.chunk(3, dim=1)
        queries.copy_(self.query_up(narrow).view(count, heads, -1))
        apply_rope_(queries, turns, positions, interleaved=True)
        joined, key = self.kv_down(x).tensor_split((latent.kv_rank,), dim=1)
        key = key.unsqueeze(1)
        apply_rope_(key, turns, positions, interleaved=True)
        normed = rms_norm(joined.contiguous(), self.kv_norm, LATENT_EPS, x.dtype)
        expanded = self.kv_up(normed).view(count, heads, -1)
        keys[..., :rotary] = key
        keys[..., rotary:] = expanded[..., : latent.plain_dim]
        values[..., : latent.value_dim] = expanded[..., latent.plain_dim :]
        store_kv(keys, values, cache, step.places)
        return queries


@dataclass(frozen=True, slots=True)
class GatedMlp:
    gate_up: Linear  # hidden -> 2 * intermediate, the gate's rows first
    down: Linear
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x), self.activation))


@dataclass(frozen=True, slots=True)
class PlainMlp:
    up: Linear
    down: Linear
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(activated(self.up(x), self.activation))


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    router: Linear  # hidden -> experts
    correction: Tensor | None  # [experts] float32
    routing: Routing
    gate_up: Tensor | Weight4  # [experts, 2 * inner, hidden]
    down: Tensor | Weight4  # [experts, hidden, inner]
    activation: str
    shared: GatedMlp | None  # of every token
    shared_gate: Linear | None  # hidden -> 1: the shared expert's weight

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = route(self.router(x), self.correction, self.routing)
        out = mix_experts(x, ids, weights, self.gate_up, self.down, self.activation)
        if self.shared is None:
            return out
        every = self.shared(x).float()
        if self.shared_gate is not None:
            every.mul_(self.shared_gate(x).float().sigmoid())
        return every.add_(out)


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One layer; its norms are none where the family has none there."""

    spec: LayerSpec
    attention_norm: DeviceNorm | None
    heads: Heads
    output: Linear  # heads * value_dim -> hidden
    attention_post_norm: DeviceNorm | None
    mlp_norm: DeviceNorm | None
    mlp: Linear
    mlp_post_norm: DeviceNorm | None


def _norm_(heads: Tensor, weight: Tensor, eps: float) -> None:
    """Norms each head, or all heads of a token at once, by the size of the weight."""
    tokens, count, size = heads.shape
    joined = heads if len(weight) == size else heads.view(tokens, 1, count * size)
    norm_heads_(joined, weight, eps)
