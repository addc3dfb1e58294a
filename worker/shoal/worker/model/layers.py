"""The parts of a decoder's layers, weights packed, each a function of the tokens' states."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.activation import ACTIVATIONS, gated
from shoal.kernels.experts import Routing, mix_experts, route
from shoal.kernels.linear import PackedLinear
from shoal.kernels.norm import layer_norm, norm_heads_, rms_norm
from shoal.kernels.rope import apply_rope_
from shoal.worker.model.spec import DecoderSpec, LatentSpec, LayerSpec, NormKind

LATENT_EPS = 1e-6  # DeepSeek's, whatever the other norms have


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over rows of the residual, or of what is added to it."""

    kind: NormKind
    weight: Tensor | None  # [hidden] float32
    bias: Tensor | None
    eps: Tensor  # [] float32

    def __call__(self, x: Tensor, out: torch.dtype) -> Tensor:
        """x [rows, hidden] -> the same shape, in `out`."""
        if self.kind in (NormKind.RMS, NormKind.RMS_PLUS_ONE):
            assert self.weight is not None, "these norms have weights"
            return rms_norm(x.float(), self.weight, self.eps, out)
        return layer_norm(x.float(), self.weight, self.bias, float(self.eps), out)


class Heads(Protocol):
    def __call__(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """Queries, keys and values of each token, normed and rotated.

        x [tokens, hidden]; turns [tokens, rotary_dim / 2] complex64, none where the layer does
        not see positions -> [tokens, heads + 2 * kv_heads, head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class ProjectedHeads:
    spec: DecoderSpec
    qkv: PackedLinear  # hidden -> (heads + 2 * kv_heads) * head_dim, rotary pairs interleaved
    query_norm: Tensor | None  # [head_dim] or [heads * head_dim] float32
    key_norm: Tensor | None

    def __call__(self, x: Tensor, turns: Tensor | None) -> Tensor:
        spec = self.spec
        rotated = spec.num_heads + spec.num_kv_heads
        heads = self.qkv(x).view(len(x), -1, spec.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            eps = torch.tensor(spec.norm_eps)
            _norm_(heads[:, : spec.num_heads], self.query_norm, eps)
            _norm_(heads[:, spec.num_heads : rotated], self.key_norm, eps)
        if spec.clip_qkv is not None:
            heads.clamp_(-spec.clip_qkv, spec.clip_qkv)
        if turns is not None:
            apply_rope_(heads[:, :rotated], turns)
        return heads


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """Latent attention, its keys and values expanded: the cache holds what every head sees."""

    spec: DecoderSpec
    latent: LatentSpec
    query_down: PackedLinear | None
    query_norm: Tensor | None  # [query_rank] float32
    query_up: PackedLinear  # -> heads * (rotary_dim + plain_dim)
    kv_down: PackedLinear  # hidden -> kv_rank + rotary_dim
    kv_norm: Tensor  # [kv_rank] float32
    kv_up: PackedLinear  # kv_rank -> heads * (plain_dim + value_dim)

    def __call__(self, x: Tensor, turns: Tensor | None) -> Tensor:
        assert turns is not None, "latent attention rotates in every layer"
        latent, count, heads = self.latent, len(x), self.spec.num_heads
        eps, rotary = torch.tensor(LATENT_EPS), latent.rotary_dim
        narrow = x
        if self.query_down is not None and self.query_norm is not None:
            narrow = rms_norm(self.query_down(x).float(), self.query_norm, eps, x.dtype)
        out = torch.zeros(count, 3 * heads, self.spec.head_dim, dtype=x.dtype)
        queries, keys, values = out.chunk(3, dim=1)
        queries.copy_(self.query_up(narrow).view(count, heads, -1))
        apply_rope_(queries, turns)
        joined, key = self.kv_down(x).tensor_split((latent.kv_rank,), dim=1)
        key = key.reshape(count, 1, rotary)
        apply_rope_(key, turns)
        normed = rms_norm(joined.float(), self.kv_norm, eps, x.dtype)
        expanded = self.kv_up(normed).view(count, heads, -1)
        keys[..., :rotary] = key
        keys[..., rotary:] = expanded[..., : latent.plain_dim]
        values[..., : latent.value_dim] = expanded[..., latent.plain_dim :]
        return out


class Mlp(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> the same shape, in float32 or in x's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMlp:
    gate: PackedLinear  # hidden -> intermediate
    up: PackedLinear
    down: PackedLinear  # intermediate -> hidden
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(gated(x, self.gate, self.up, self.activation))


@dataclass(frozen=True, slots=True)
class PlainMlp:
    up: PackedLinear
    down: PackedLinear
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    router: PackedLinear  # hidden -> experts
    correction: Tensor | None  # [experts] float32
    routing: Routing
    experts: tuple[GatedMlp, ...]
    shared: GatedMlp | None  # of every token
    shared_gate: PackedLinear | None  # hidden -> 1: the shared expert's weight

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = route(self.router(x), self.correction, self.routing)
        out = mix_experts(x, ids, weights, self.experts)
        if self.shared is None:
            return out
        every = self.shared(x).float()
        if self.shared_gate is not None:
            every.mul_(self.shared_gate(x).float().sigmoid())
        return out.add_(every)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer; its norms are none where the family has none there."""

    spec: LayerSpec
    attention_norm: Norm | None
    heads: Heads
    output: PackedLinear  # heads * value_dim -> hidden
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp
    mlp_post_norm: Norm | None


def _norm_(heads: Tensor, weight: Tensor, eps: Tensor) -> None:
    """Norms each head, or all heads of a token at once, by the size of the weight."""
    tokens, count, size = heads.shape
    if len(weight) == size:
        norm_heads_(heads, weight, eps)
        return
    norm_heads_(heads.view(tokens, count * size), weight, eps)
