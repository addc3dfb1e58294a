"""The paged KV cache and the plan by which one step's tokens store to it and attend over it.

A layer's cache is `[2 * kv_heads * num_blocks, block_size * head_dim]`: all blocks of key head 0,
then of key head 1, and so on, then the value heads. One block of one head is one row, so one
`index_select` gathers keys and values of many sequences.

The plan is made once a step and serves every layer. Tokens of a step lie flat: first the
sequences that compute one token, longest context first (`flat_order`), then the others, whole.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]

QUERY_TILE = 128  # queries of a prefill chunk that attend together
_GROUP_STEP = 8  # decode groups end at multiples of this many rows
# Starting one more decode group costs about as much as gathering this many tokens.
_GROUP_COST_TOKENS = 3000
# Below this many gathered tokens float32 GEMMs beat bfloat16 ones, which start slowly.
_SMALL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of one layer's cache. Block 0 is null: never written, read only under a mask."""

    num_blocks: int
    block_size: int  # tokens
    kv_heads: int
    head_dim: int

    def allocate(self, dtype: torch.dtype) -> Tensor:
        """A layer's cache, zeroed: what lies under a mask must be finite. NumPy leaves the pages
        to the kernel, which zeroes each on first use; torch would touch them all here."""
        rows = 2 * self.kv_heads * self.num_blocks
        width = self.block_size * self.head_dim * dtype.itemsize
        return torch.from_numpy(np.zeros((rows, width), np.uint8)).view(dtype)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows `first .. first + count` of the flat batch: one query each, contexts of like length."""

    first: int
    count: int
    blocks: Tensor  # [2 * count * kv_heads * blocks] cache rows: keys, then values
    bias: Tensor  # [count, 1, keys]: 0 where visible, else -inf; its dtype is that of the GEMMs


@dataclass(frozen=True, slots=True)
class Tile:
    """Up to QUERY_TILE queries of a chunk and the keys that any of them sees."""

    first: int  # query within the chunk
    count: int
    padded: int  # `count` rounded up, so that few distinct GEMM shapes occur
    keys_from: int  # within the gathered keys
    keys_to: int
    edge: Tensor  # [padded, width], added to the scores of the last `width` keys


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows `first .. first + count` of the flat batch: consecutive tokens of one sequence."""

    first: int
    count: int
    blocks: Tensor  # [2 * kv_heads * blocks] cache rows: keys, then values
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Where the tokens of one step are stored and what each may see."""

    sequence: Ints  # [num_tokens] index of each token's sequence
    position: Ints  # [num_tokens] of each token within its sequence
    store: Tensor  # [num_tokens * 2 * kv_heads] rows of the cache viewed as [.., head_dim]
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.position)


def flat_order(starts: Ints, counts: Ints) -> Ints:
    """The order in which `plan_batch` wants its sequences: indices into `starts`."""
    single = counts == 1
    return np.lexsort((np.where(single, -starts, 0), ~single))


def plan_batch(
    starts: Ints,
    counts: Ints,
    tables: Ints,
    shape: CacheShape,
    dtype: torch.dtype,
    window: int | None = None,
) -> PagedBatch:
    """Plans a step for sequences in `flat_order`.

    starts [sequences]: tokens already in the cache; counts [sequences]: tokens of this step, at
    least 1; tables [sequences, blocks]: block tables, 0 where none is allocated; dtype: of the
    queries. With `window` a token sees itself and the `window - 1` tokens before it.
    """
    sequences = len(counts)
    decoding = int((counts == 1).sum())
    if not (counts[:decoding] == 1).all() or (np.diff(starts[:decoding]) > 0).any():
        raise ValueError("sequences must be in flat_order")
    sequence = np.repeat(np.arange(sequences), counts)
    firsts = np.cumsum(counts) - counts
    position = starts[sequence] + np.arange(len(sequence)) - firsts[sequence]
    block = tables[sequence, position // shape.block_size]
    slot = block * shape.block_size + position % shape.block_size
    stride = shape.num_blocks * shape.block_size
    store = slot[:, None] + np.arange(2 * shape.kv_heads) * stride
    groups = []
    for first, end in _group(starts[:decoding] + 1, shape.block_size):
        rows = slice(first, end)
        groups.append(_decode_group(first, starts[rows], tables[rows], shape, dtype, window))
    chunks = []
    for index in range(decoding, sequences):
        first, start, count = int(firsts[index]), int(starts[index]), int(counts[index])
        chunks.append(_prefill_chunk(first, start, count, tables[index], shape, dtype, window))
    rows_of_store = torch.from_numpy(store.reshape(-1))
    return PagedBatch(sequence, position, rows_of_store, tuple(groups), tuple(chunks))


def _group(lengths: Ints, block_size: int) -> list[tuple[int, int]]:
    """Splits falling context lengths into runs [first, end) that are worth a gather of their own.

    A run is padded to its longest. It ends where all shorter rows together would waste more
    than another group costs.
    """
    groups = []
    first, total = 0, len(lengths)
    for index in range(_GROUP_STEP, total, _GROUP_STEP):
        waste = (int(lengths[first]) - int(lengths[index])) * (total - index)
        if index > first and waste > max(_GROUP_COST_TOKENS, block_size):
            groups.append((first, index))
            first = index
    if total:
        groups.append((first, total))
    return groups


def _rounded(keys: int) -> int:
    """Rounds a number of keys up, so that GEMM shapes repeat: each new one costs about 1 ms."""
    step = 16 if keys <= 64 else 32 if keys <= 512 else 128
    return -(-keys // step) * step


def _cache_rows(blocks: Ints, shape: CacheShape) -> Tensor:
    """blocks [sequences, n] -> cache rows [2 * sequences * kv_heads * n]: keys, then values."""
    head = np.arange(2 * shape.kv_heads).reshape(2, 1, shape.kv_heads, 1) * shape.num_blocks
    return torch.from_numpy((head + blocks[None, :, None, :]).reshape(-1))


def _take_blocks(tables: Ints, first: Ints, count: int) -> Ints:
    """`count` entries of each table from entry `first` on; null beyond its end."""
    index = first[:, None] + np.arange(count)
    inside = index < tables.shape[1]
    taken = np.take_along_axis(tables, np.minimum(index, tables.shape[1] - 1), axis=1)
    return np.where(inside, taken, 0)


def _decode_group(
    first: int,
    starts: Ints,
    tables: Ints,
    shape: CacheShape,
    dtype: torch.dtype,
    window: int | None,
) -> DecodeGroup:
    size = shape.block_size
    lowest = np.zeros_like(starts) if window is None else np.maximum(starts - window + 1, 0)
    first_block = lowest // size
    count = -(-_rounded(int((starts + 1 - first_block * size).max())) // size)
    blocks = _take_blocks(tables, first_block, count)
    key = first_block[:, None] * size + np.arange(count * size)
    hidden = (key > starts[:, None]) | (key < lowest[:, None])
    if hidden.size <= _SMALL_TOKENS:
        dtype = torch.float32
    bias = _bias(torch.from_numpy(hidden), dtype)
    return DecodeGroup(first, len(starts), _cache_rows(blocks, shape), bias.unsqueeze(1))


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _prefill_chunk(
    first: int,
    start: int,
    count: int,
    table: Ints,
    shape: CacheShape,
    dtype: torch.dtype,
    window: int | None,
) -> PrefillChunk:
    size = shape.block_size
    first_block = 0 if window is None else max(start - window + 1, 0) // size
    base = first_block * size  # position of the first gathered key
    num_blocks = -(-_rounded(start + count - base) // size)
    blocks = _take_blocks(table[None], np.array([first_block]), num_blocks)
    gathered = num_blocks * size
    triangle = _bias(torch.ones(QUERY_TILE, 2 * QUERY_TILE, dtype=torch.bool).triu_(1), dtype)
    tiles = []
    for query in range(0, count, QUERY_TILE):
        queries = min(QUERY_TILE, count - query)
        padded = -(-queries // 16) * 16
        own = start + query - base  # the first query's own key
        keys_to = min(-(-(own + queries) // QUERY_TILE) * QUERY_TILE, gathered)
        if window is None or own + queries <= window:
            keys_from = 0
            edge = triangle[:padded, : keys_to - own]
        else:
            keys_from = max(own - window + 1, 0) // QUERY_TILE * QUERY_TILE
            key = torch.arange(keys_from, keys_to)
            query_key = own + torch.arange(padded).unsqueeze(1)
            hidden = (key > query_key) | (key <= query_key - window)
            hidden[queries:] = False
            edge = _bias(hidden, dtype)
        tiles.append(Tile(query, queries, padded, keys_from, keys_to, edge))
    return PrefillChunk(first, count, _cache_rows(blocks, shape), tuple(tiles))
