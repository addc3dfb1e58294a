"""Norms over all query heads of a token together, and all key heads, where lanes have some each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.linear import PackedLinear
from shoal.kernels.rope import apply_rope_
from shoal.worker.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class NormedTogether:
    """Implements `shoal.worker.model.layers.Heads` for a lane: the sums of squares are those of
    all lanes. A key head that several lanes hold counts once."""

    part: DecoderSpec  # the lane's
    whole: DecoderSpec
    qkv: PackedLinear  # hidden -> (heads + 2 * kv_heads) * head_dim of this lane
    query_norm: Tensor  # [heads * head_dim] float32, this lane's
    key_norm: Tensor
    key_holders: int  # lanes that hold the same key heads
    sum_: Callable[[Tensor], Tensor]  # over the lanes

    def __call__(self, x: Tensor, turns: Tensor | None) -> Tensor:
        part, whole = self.part, self.whole
        rotated = part.num_heads + part.num_kv_heads
        heads = self.qkv(x).view(len(x), -1, part.head_dim)
        queries, keys = heads[:, : part.num_heads], heads[:, part.num_heads : rotated]
        squares = torch.stack(
            (_squares(queries), _squares(keys) / self.key_holders), dim=1
        ).contiguous()
        self.sum_(squares)
        for column, values, weight, count in (
            (0, queries, self.query_norm, whole.num_heads),
            (1, keys, self.key_norm, whole.num_kv_heads),
        ):
            mean = squares[:, column] / (count * part.head_dim)
            inverse = mean.add_(part.norm_eps).rsqrt_().view(-1, 1, 1)
            values.copy_(values.float() * inverse * weight.view(-1, part.head_dim))
        if part.clip_qkv is not None:
            heads.clamp_(-part.clip_qkv, part.clip_qkv)
        if turns is not None:
            apply_rope_(heads[:, :rotated], turns)
        return heads


def _squares(heads: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [tokens] float32"""
    return heads.float().square().sum((1, 2))
