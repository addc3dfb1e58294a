"""Batches for the tests of attention: caches full of NaN but for what the sequences own."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.kernels.gpu.attention import AttentionBatch
from shoal.kernels.gpu.attention_plan import Plan, Tile
from shoal.kernels.gpu.kv_cache import QUANTIZED, KvCache

# Small tiles and splits, so that a few dozen keys take every path.
SMALL = Plan(few=Tile(4, 4, 16, 16), many=Tile(4, 4, 16, 16), splits=3, least_keys=16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class Case:
    """Lengths and queries of the sequences, and the heads that attend."""

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # of the queries unless given
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def draw(self, *shape: int, device: torch.device) -> Tensor:
        return torch.randn(*shape, generator=self.generator()).to(self.dtype).to(device)

    def queries(self, device: torch.device) -> Tensor:
        return self.draw(sum(self.counts), self.heads, self.head_dim, device=device)


def batch_of(case: Case, device: torch.device) -> tuple[AttentionBatch, int]:
    """Tables of shuffled blocks, and how many blocks there are; table ends list block 0."""
    blocks = [-(-length // case.block_size) for length in case.lengths]
    order = (torch.randperm(sum(blocks), generator=case.generator()) + 1).tolist()
    tables = torch.zeros(len(blocks), max(*blocks, 1, 1) + 1, dtype=torch.int32)
    for row, count in zip(tables, blocks, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    starts = torch.tensor([0, *case.counts]).cumsum(0).int()
    batch = AttentionBatch(
        query_starts=starts.to(device),
        lengths=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        tables=tables.to(device),
        max_queries=max(case.counts),
        max_length=max(case.lengths),
    )
    return batch, sum(blocks) + 2


def slots_of(batch: AttentionBatch, block_size: int) -> Tensor:
    """Slots of every token that the sequences have, in order of sequence and position."""
    slots = []
    for length, table in zip(batch.lengths.tolist(), batch.tables.long(), strict=True):
        position = torch.arange(length, device=table.device)
        slots.append(table[position // block_size] * block_size + position % block_size)
    return torch.cat(slots)


def cache_of(case: Case, batch: AttentionBatch, num_blocks: int, device: torch.device) -> KvCache:
    """Random keys and values where the sequences have tokens, the worst elsewhere."""
    dtype = case.cache_dtype or case.dtype
    cache = KvCache.allocate(
        num_blocks, case.kv_heads, case.block_size, case.head_dim, dtype, device
    )
    slots = slots_of(batch, case.block_size)
    block, offset = slots // case.block_size, slots % case.block_size
    shape = (len(slots), case.kv_heads, case.head_dim)
    other = replace(case, seed=case.seed + 1)
    for rows, scales, of in (
        (cache.keys, cache.key_scales, case),
        (cache.values, cache.value_scales, other),
    ):
        x = of.draw(*shape, device=device).float()
        if scales is not None:
            scales.fill_(float("nan"))
            limit = 127 if dtype is torch.int8 else 448
            scale = x.abs().amax(-1) / limit
            scales[block, :, offset] = scale
            x = x / scale[..., None]
            x = x.round() if dtype is torch.int8 else x
        if dtype is torch.float8_e4m3fn:
            # All bits set is NaN; fill and index know bytes alone.
            rows.view(torch.uint8).fill_(255)
            rows.view(torch.uint8)[block, :, offset] = x.to(dtype).view(torch.uint8)
        else:
            rows.fill_(127 if dtype in QUANTIZED else float("nan"))
            rows[block, :, offset] = x.to(dtype)
    return cache
