"""What the attention kernels must give: the same sums in float64, a sequence at a time."""

import torch
from torch import Tensor

from shoal.kernels.gpu.attention import AttentionBatch
from shoal.kernels.gpu.kv_cache import KvCache


def paged_attention_reference(
    queries: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `paged_attention`; [tokens, heads, head_dim] float64, zeros where nothing is written."""
    out = torch.zeros(queries.shape, dtype=torch.float64, device=queries.device)
    for rows, length, table in _sequences(batch):
        keys = _gather(cache.keys, cache.key_scales, table, length)
        values = _gather(cache.values, cache.value_scales, table, length)
        out[rows] = _attend(queries[rows].double(), keys, values, scale, window, softcap)
    return out


def latent_attention_reference(
    queries: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, kv_rank: int
) -> Tensor:
    """As `latent_attention`; [tokens, heads, kv_rank] float64."""
    out = torch.zeros(*queries.shape[:2], kv_rank, dtype=torch.float64, device=queries.device)
    for rows, length, table in _sequences(batch):
        keys = _gather(cache.unsqueeze(1), None, table, length)
        out[rows] = _attend(queries[rows].double(), keys, keys[..., :kv_rank], scale, None, None)
    return out


def _sequences(batch: AttentionBatch) -> list[tuple[slice, int, Tensor]]:
    starts, lengths = batch.query_starts.tolist(), batch.lengths.tolist()
    return [
        (slice(start, end), length, table.long())
        for start, end, length, table in zip(
            starts[:-1], starts[1:], lengths, batch.tables, strict=True
        )
        if length and end > start
    ]


def _gather(cache: Tensor, scales: Tensor | None, table: Tensor, length: int) -> Tensor:
    """[blocks, kv_heads, block_size, dim] -> [kv_heads, length, dim] float64."""
    blocks = table[: -(-length // cache.shape[2])]
    rows = cache[blocks].double()
    if scales is not None:
        rows = rows * scales[blocks].double().unsqueeze(-1)
    return rows.transpose(0, 1).flatten(1, 2)[:, :length]


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """queries [n, heads, dim], keys [kv_heads, length, dim] -> [n, heads, value_dim]."""
    count, heads, _ = queries.shape
    length, group = keys.shape[1], heads // keys.shape[0]
    scores = queries.transpose(0, 1) @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(length - count, length, device=queries.device)[:, None]
    key = torch.arange(length, device=queries.device)[None, :]
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ values.repeat_interleave(group, 0)).transpose(0, 1)
