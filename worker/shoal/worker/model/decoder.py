"""The forward pass of a decoder over a flat batch of tokens and a paged KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.attention import paged_attention, store_kv_
from shoal.kernels.linear import PackedLinear, gated_silu
from shoal.kernels.norm import add_rms_norm, rms_norm
from shoal.kernels.paged import CacheShape, PagedBatch
from shoal.kernels.rope import apply_rope_
from shoal.worker.model.precision import Precision
from shoal.worker.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer, norms in float32, projections packed."""

    attention_norm: Tensor  # [hidden]
    qkv: PackedLinear  # hidden -> (heads + 2 * kv_heads) * head_dim, rotary pairs interleaved
    output: PackedLinear  # heads * head_dim -> hidden
    mlp_norm: Tensor  # [hidden]
    gate: PackedLinear  # hidden -> intermediate
    up: PackedLinear  # hidden -> intermediate
    down: PackedLinear  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model. Holds weights only: the caches belong to the caller."""

    spec: DecoderSpec
    precision: Precision
    embedding: Tensor  # [vocab, hidden] in the weights' dtype
    layers: tuple[DecoderLayer, ...]
    norm: Tensor  # [hidden] float32
    head: PackedLinear  # hidden -> vocab

    def forward(
        self,
        tokens: Tensor,
        turns: Tensor,
        batch: PagedBatch,
        caches: Sequence[Tensor],
        shape: CacheShape,
        rows: Tensor,
    ) -> Tensor:
        """Hidden states, before the last norm, of the flat rows that are asked for.

        tokens [num_tokens] int64 in the batch's order; turns [num_tokens, rotary_dim / 2], the
        rope of their positions; caches: one a layer, which the tokens' keys and values are
        written to; rows [n] int64 -> [n, hidden] float32.
        """
        spec, compute = self.spec, self.precision.compute
        count, kv_heads = len(tokens), spec.num_kv_heads
        rotated = spec.num_heads + kv_heads
        eps = torch.tensor(spec.rms_eps)
        residual = self.embedding.index_select(0, tokens).float()
        normed = rms_norm(residual, self.layers[0].attention_norm, eps, compute)
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            heads = layer.qkv(normed).view(count, rotated + kv_heads, spec.head_dim)
            apply_rope_(heads[:, :rotated], turns)
            store_kv_(cache, heads[:, spec.num_heads :], batch, shape)
            queries = heads[:, : spec.num_heads]
            attended = paged_attention(queries, cache, batch, shape, spec.head_dim**-0.5)
            last = index + 1 == len(self.layers)
            if last:
                residual, attended = residual.index_select(0, rows), attended.index_select(0, rows)
            delta = layer.output(attended)
            normed = add_rms_norm(residual, delta, layer.mlp_norm, eps, compute)
            delta = layer.down(gated_silu(normed, layer.gate, layer.up))
            if last:
                return residual.add_(delta)
            following = self.layers[index + 1].attention_norm
            normed = add_rms_norm(residual, delta, following, eps, compute)
        raise AssertionError("a decoder has at least one layer")

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] float32, as `forward` returns it -> [rows, vocab] float32."""
        eps = torch.tensor(self.spec.rms_eps)
        normed = rms_norm(hidden, self.norm, eps, self.precision.compute)
        return self.head(normed).float()
