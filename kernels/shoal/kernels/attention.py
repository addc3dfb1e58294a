"""Attention over a paged KV cache, for steps that mix decoding sequences and prefill chunks.

Queries of the heads that share a key head are rows of one GEMM, so keys and values are read
once for all of them.
"""

import torch
from torch import Tensor

from shoal.kernels.paged import CacheShape, DecodeGroup, PagedBatch, PrefillChunk


def store_kv_(cache: Tensor, kv: Tensor, batch: PagedBatch, shape: CacheShape) -> None:
    """Writes keys and values of the batch's tokens into a layer's cache.

    kv [num_tokens, 2 * kv_heads, head_dim]: key heads, then value heads. To be called for all
    tokens of the step before `paged_attention`. A float16 cache saturates.
    """
    rows = kv.reshape(-1, shape.head_dim)
    if cache.dtype is torch.float16:
        limit = torch.finfo(torch.float16).max
        rows = rows.clamp(-limit, limit).to(torch.float16)
    cache.view(-1, shape.head_dim).index_copy_(0, batch.store, rows)


def paged_attention(
    queries: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    shape: CacheShape,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(q k^T * scale) v` of each token over what the batch lets it see.

    queries [num_tokens, heads, head_dim] in the batch's flat order, heads a multiple of
    kv_heads; cache is the layer's. With `softcap` a score s becomes `softcap * tanh(s / softcap)`.
    Returns [num_tokens, heads * head_dim] in the queries' dtype.
    """
    tokens, heads, head_dim = queries.shape
    if tokens != batch.num_tokens or head_dim != shape.head_dim or heads % shape.kv_heads:
        raise ValueError(f"queries {list(queries.shape)} do not fit {shape}")
    scaled = torch.mul(queries, scale)
    if len(batch.decode) == 1 and not batch.prefill:
        return _decode(scaled, cache, batch.decode[0], shape, softcap).view(tokens, -1)
    out = torch.empty(tokens, heads * head_dim, dtype=queries.dtype)
    for group in batch.decode:
        rows = slice(group.first, group.first + group.count)
        out[rows] = _decode(scaled[rows], cache, group, shape, softcap).view(group.count, -1)
    for chunk in batch.prefill:
        rows = slice(chunk.first, chunk.first + chunk.count)
        _prefill(scaled[rows], cache, chunk, shape, out[rows], softcap)
    return out


def _decode(
    queries: Tensor, cache: Tensor, group: DecodeGroup, shape: CacheShape, softcap: float | None
) -> Tensor:
    """queries [count, heads, head_dim], contiguous and scaled -> the same shape."""
    count, heads, head_dim = queries.shape
    keys, dtype = group.bias.shape[2], group.bias.dtype
    pairs = count * shape.kv_heads
    gathered = cache.index_select(0, group.blocks).to(dtype).view(2, pairs, keys, head_dim)
    q = queries.view(pairs, heads // shape.kv_heads, head_dim).to(dtype)
    scores = torch.bmm(q, gathered[0].transpose(1, 2)).view(count, heads, keys)
    weights = _cap_(scores, softcap).add_(group.bias).softmax(-1)
    out = torch.bmm(weights.view(pairs, -1, keys), gathered[1])
    return out.to(queries.dtype).view(count, heads, head_dim)


def _prefill(
    queries: Tensor,
    cache: Tensor,
    chunk: PrefillChunk,
    shape: CacheShape,
    out: Tensor,
    softcap: float | None,
) -> None:
    """queries [count, heads, head_dim], scaled -> out [count, heads * head_dim]."""
    count, heads, head_dim = queries.shape
    group = heads // shape.kv_heads
    gathered = cache.index_select(0, chunk.blocks).to(queries.dtype)
    keys, values = gathered.view(2, shape.kv_heads, -1, head_dim).unbind(0)
    last = chunk.tiles[-1]
    padded = torch.zeros(
        shape.kv_heads, group, last.first + last.padded, head_dim, dtype=queries.dtype
    )
    padded[:, :, :count] = queries.view(count, shape.kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out = out.view(count, shape.kv_heads, group, head_dim)
    for tile in chunk.tiles:
        seen = slice(tile.keys_from, tile.keys_to)
        q = padded[:, :, tile.first : tile.first + tile.padded]
        q = q.reshape(shape.kv_heads, group * tile.padded, head_dim)
        scores = torch.bmm(q, keys[:, seen].transpose(1, 2))
        by_query = _cap_(scores, softcap).view(shape.kv_heads * group, tile.padded, -1)
        by_query[..., -tile.edge.shape[1] :].add_(tile.edge)
        attended = torch.bmm(scores.softmax(-1), values[:, seen])
        attended = attended.view(shape.kv_heads, group, tile.padded, head_dim)
        out[tile.first : tile.first + tile.count] = attended[:, :, : tile.count].permute(2, 0, 1, 3)


def _cap_(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
