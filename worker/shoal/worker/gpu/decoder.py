"""The forward pass of a decoder on a device: the same specs and weights as on a CPU, over kernels
that do more at once. A norm takes the sum of the residual with it, so a layer hands its last part
to the norm of the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.gpu.attention import paged_attention
from shoal.kernels.gpu.embedding import embed
from shoal.kernels.gpu.kv_cache import KvCache
from shoal.worker.gpu.layers import DeviceLayer, DeviceNorm, Linear, StepInputs
from shoal.worker.model.precision import Precision
from shoal.worker.model.rope import RopeSpec
from shoal.worker.model.spec import DecoderSpec, Residual


@dataclass(frozen=True, slots=True)
class DeviceDecoder:
    """A loaded model. Holds weights only: the caches belong to the caller."""

    spec: DecoderSpec
    precision: Precision
    embedding: Tensor  # [vocab, hidden] in the weights' dtype
    positions: Tensor | None  # [learned_positions, hidden]
    layers: tuple[DeviceLayer, ...]
    norm: DeviceNorm
    head: Linear  # hidden -> vocab
    turns: Mapping[RopeSpec, Tensor]  # [positions, rotary_dim] float32: see gpu.rope

    def forward(
        self, ids: Tensor, step: StepInputs, caches: Sequence[KvCache], rows: Tensor | None = None
    ) -> Tensor:
        """Stores the tokens' keys and values, and returns the last norm's output.

        ids [tokens] int64; one cache a layer; rows [n] int64: the flat rows that are asked for,
        all where none are given -> [n, hidden] in the compute dtype.
        """
        residual = self._embed(ids, step.positions)
        normed = self._normed(self.layers[0].attention_norm, residual)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, normed, step, caches[index])
            if index == last and rows is not None:
                residual, attended, normed = (
                    part.index_select(0, rows) for part in (residual, attended, normed)
                )
            following = self.norm if index == last else self.layers[index + 1].attention_norm
            normed = self._rest(layer, residual, normed, layer.output(attended), following)
        return normed

    @property
    def logits_dtype(self) -> torch.dtype:
        """The compute dtype, or float32 where logits are more than the head's products."""
        plain = self.spec.logit_scale == 1.0 and self.spec.logit_softcap is None
        return self.precision.compute if plain else torch.float32

    def logits(self, normed: Tensor) -> Tensor:
        """normed [rows, hidden], as `forward` returns it -> [rows, vocab] in `logits_dtype`."""
        spec = self.spec
        logits = self.head(normed).to(self.logits_dtype)
        if spec.logit_scale != 1.0:
            logits.mul_(spec.logit_scale)
        cap = spec.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The residual, [tokens, hidden] float32."""
        scale = self.spec.embedding_scale
        if scale != 1.0:  # rounded as transformers rounds it
            scale = float(torch.tensor(scale, dtype=self.precision.weights))
        residual = embed(ids, self.embedding, torch.float32, scale)
        if self.positions is not None:
            residual.add_(self.positions.index_select(0, positions))
        return residual

    def _attend(self, layer: DeviceLayer, x: Tensor, step: StepInputs, cache: KvCache) -> Tensor:
        """[tokens, hidden] -> [tokens, heads * value_dim]"""
        spec, rope = self.spec, layer.spec.rope
        turns = None if rope is None else self.turns[rope]
        attended = paged_attention(
            layer.heads(x, turns, step, cache),
            cache,
            step.batch,
            spec.score_scale,
            window=layer.spec.window,
            softcap=spec.attention_softcap,
        )
        return attended[..., : spec.value_dim].reshape(len(x), -1)

    def _rest(
        self,
        layer: DeviceLayer,
        residual: Tensor,
        normed: Tensor,
        delta: Tensor,
        following: DeviceNorm | None,
    ) -> Tensor:
        """The layer behind its attention: `delta` is what that adds to the residual, `normed` what
        it read. The residual is changed; returns what the next layer reads."""
        spec = self.spec
        if spec.residual is Residual.SEQUENTIAL:
            normed = self._add(residual, delta, layer.attention_post_norm, layer.mlp_norm)
            return self._add(residual, layer.mlp(normed), layer.mlp_post_norm, following)
        if spec.residual is Residual.PARALLEL:
            normed = self._normed(layer.mlp_norm, residual)
        return self._add(residual, delta + layer.mlp(normed), None, following)

    def _add(
        self,
        residual: Tensor,
        delta: Tensor,
        norm: DeviceNorm | None,
        following: DeviceNorm | None,
    ) -> Tensor:
        """Adds `delta`, through its norm, and returns the sum through the following norm."""
        if norm is not None:
            delta = norm(delta, torch.float32)
        if self.spec.residual_scale != 1.0:
            delta = delta * self.spec.residual_scale
        if following is None:
            return residual.add_(delta).to(self.precision.compute, copy=True)
        return following.after_adding(residual, delta, self.precision.compute)

    def _normed(self, norm: DeviceNorm | None, residual: Tensor) -> Tensor:
        compute = self.precision.compute
        return residual.to(compute, copy=True) if norm is None else norm(residual, compute)
