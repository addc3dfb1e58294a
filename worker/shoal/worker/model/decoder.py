"""The forward pass of a decoder over a flat batch of tokens and a paged KV cache.

A rank of a model that is divided holds some of the layers and a part of each: what its layers add
is then a share, which `reduce` sums, and the first and last stages alone embed and give logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.attention import paged_attention, store_kv_
from shoal.kernels.linear import PackedLinear
from shoal.kernels.paged import CacheShape, PagedBatch
from shoal.worker.model.layers import DecoderLayer, Norm
from shoal.worker.model.precision import Precision
from shoal.worker.model.rope import RopeSpec
from shoal.worker.model.spec import DecoderSpec, Residual

Reduce = Callable[[Tensor], Tensor]


def alone(share: Tensor) -> Tensor:
    """The sum over one rank."""
    return share


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What the layers of one step share."""

    turns: Mapping[RopeSpec, Tensor]  # [tokens, rotary_dim / 2], the rope of their positions
    batches: Mapping[int | None, PagedBatch]  # by window
    caches: Sequence[Tensor]  # one a layer, which keys and values are written to
    shape: CacheShape


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model. Holds weights only: the caches belong to the caller."""

    spec: DecoderSpec
    precision: Precision
    embedding: Tensor | None  # [vocab, hidden] in the weights' dtype; none behind the first stage
    positions: Tensor | None  # [learned_positions, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: Norm | None  # none before the last stage, as is the head
    head: PackedLinear | None  # hidden -> vocab
    reduce: Reduce = alone

    def forward(self, ids: Tensor, positions: Tensor, step: LayerInputs, rows: Tensor) -> Tensor:
        """Hidden states, before the last norm, of the flat rows that are asked for.

        ids and positions [tokens] int64 in the batch's order; rows [n] int64
        -> [n, hidden] float32.
        """
        return self.run(self.embed(ids, positions), step, rows)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and positions [tokens] int64 -> the residual, [tokens, hidden] float32."""
        assert self.embedding is not None, "the first stage embeds"
        residual = self.embedding.index_select(0, ids).float()
        if self.spec.embedding_scale != 1.0:
            # Rounded as transformers rounds it.
            scale = torch.tensor(self.spec.embedding_scale, dtype=self.precision.weights)
            residual.mul_(scale.float())
        if self.positions is not None:
            residual.add_(self.positions.index_select(0, positions))
        return residual

    def run(self, residual: Tensor, step: LayerInputs, rows: Tensor | None = None) -> Tensor:
        """The residual behind these layers: [tokens, hidden] float32, which is written to. With
        `rows` that of the flat rows alone, and the last layer computes no others."""
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            residual = self._layer(
                layer, residual, step, step.caches[index], rows if last else None
            )
        return residual

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] float32, as `forward` returns it -> [rows, vocab] float32."""
        assert self.norm is not None and self.head is not None, "the last stage has the head"
        logits = self.head(self.norm(hidden, self.precision.compute)).float()
        if self.spec.logit_scale != 1.0:
            logits.mul_(self.spec.logit_scale)
        cap = self.spec.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _layer(
        self,
        layer: DecoderLayer,
        residual: Tensor,
        step: LayerInputs,
        cache: Tensor,
        rows: Tensor | None,
    ) -> Tensor:
        spec = self.spec
        normed = self._normed(layer.attention_norm, residual)
        attended = self._attend(layer, normed, step, cache)
        if rows is not None:
            residual, attended = residual.index_select(0, rows), attended.index_select(0, rows)
        delta = layer.output(attended)
        if spec.residual is Residual.SEQUENTIAL:
            residual = self._add(residual, delta, layer.attention_post_norm)
            delta = layer.mlp(self._normed(layer.mlp_norm, residual))
            return self._add(residual, delta, layer.mlp_post_norm)
        if spec.residual is Residual.PARALLEL:
            normed = self._normed(layer.mlp_norm, residual)
        elif rows is not None:
            normed = normed.index_select(0, rows)
        return self._add(residual, delta + layer.mlp(normed), None)

    def _attend(self, layer: DecoderLayer, x: Tensor, step: LayerInputs, cache: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, heads * value_dim]"""
        spec, rope = self.spec, layer.spec.rope
        batch = step.batches[layer.spec.window]
        heads = layer.heads(x, None if rope is None else step.turns[rope])
        store_kv_(cache, heads[:, spec.num_heads :], batch, step.shape)
        attended = paged_attention(
            heads[:, : spec.num_heads],
            cache,
            batch,
            step.shape,
            spec.score_scale,
            spec.attention_softcap,
        )
        if spec.value_dim == spec.head_dim:
            return attended
        by_head = attended.view(len(x), spec.num_heads, spec.head_dim)
        return by_head[..., : spec.value_dim].reshape(len(x), -1)

    def _normed(self, norm: Norm | None, residual: Tensor) -> Tensor:
        compute = self.precision.compute
        return residual.to(compute) if norm is None else norm(residual, compute)

    def _add(self, residual: Tensor, delta: Tensor, norm: Norm | None) -> Tensor:
        delta = self.reduce(delta)
        if norm is not None:
            delta = norm(delta, torch.float32)
        if self.spec.residual_scale != 1.0:
            delta = delta * self.spec.residual_scale
        return residual.add_(delta)
