"""The kernel of paged attention: a tile of queries over the keys that a block table leads to.

`softmax(q k^T * scale) v` with an online softmax in base 2 (Dao, "FlashAttention-2", 2023). Keys
and values of 8 bits are widened in registers: a key's scale multiplies its scores, a value's
scale its weights, so neither costs a pass over the tile.
"""

import triton
import triton.language as tl

from shoal.kernels.gpu.attention_split import first_key, keys_of_a_split
from shoal.kernels.gpu.quantize import decode_e4m3

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        *("sequences", "splits", "least", "skip", "scale", "window", "softcap", "table_stride")
    ]
)
def attention_kernel(
    queries,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    keys,  # [blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    values,
    key_scales,  # [blocks, KV_HEADS, BLOCK_SIZE] or none
    value_scales,
    out,  # like queries, contiguous
    parts,  # as `merge_splits` takes them, or none
    sums,
    starts,
    lengths,
    tables,
    sequences,
    splits,
    least,
    skip,
    scale,
    window,
    softcap,
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    PROGRAMS: tl.constexpr = KV_HEADS * HEAD_TILES
    head_tile = tl.program_id(0) % PROGRAMS
    index = tl.program_id(0) // PROGRAMS
    kv_head, head_tile = head_tile // HEAD_TILES, head_tile % HEAD_TILES
    if skip is None:
        sequence, split = index // splits, index % splits
        first = 0
    else:
        # Late tiles see the most keys: they go first, so that short ones fill the gaps.
        tile = tl.num_programs(0) // PROGRAMS - 1 - index
        sequence, split = find_sequence(starts, sequences, tile, QUERIES), 0
        first = (tile - tl.load(starts + sequence) // QUERIES - sequence) * QUERIES
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    if first >= count:
        return
    if skip is None:
        if count > QUERIES:
            return
    elif count <= skip:
        return

    context = tl.load(lengths + sequence) - count  # negative for a padding row
    last = tl.minimum(first + QUERIES, count) - 1
    end = tl.maximum(context + last + 1, 0)
    begin = first_key(context + first, window, KEYS)
    used = 1
    if parts is not None:
        share = keys_of_a_split(end - begin, splits, least, KEYS)
        used = tl.cdiv(end - begin, share)
        if split >= tl.maximum(used, 1):
            return
        begin += split * share
        end = tl.minimum(end, begin + share)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    query = first + rows // HEADS
    member = head_tile * HEADS + rows % HEADS
    inside = (rows < QUERIES * HEADS) & (query < count) & (member < GROUP)
    head = kv_head * GROUP + member
    row = (start + query).to(tl.int64) * query_stride + head * query_head_stride
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(queries + row[:, None] + dims[None, :], mask=mask, other=0.0)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    table = tables + sequence.to(tl.int64) * table_stride
    position = context + query
    if skip is None:
        acc, total, peak = _attend(
            q, keys, values, key_scales, value_scales, table, position, begin, end, end, kv_head,
            scale, window, softcap, block_stride, head_stride, acc, total, peak,
            True, KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS,
        )  # fmt: skip
    else:
        # Keys that every query of the tile sees need no mask.
        seen = tl.maximum(context + first + 1, 0) // KEYS * KEYS
        whole = begin
        if window is not None:
            oldest = tl.maximum(context + last + 1 - window, 0)
            whole = tl.minimum(tl.cdiv(oldest, KEYS) * KEYS, end)
            acc, total, peak = _attend(
                q, keys, values, key_scales, value_scales, table, position, begin, whole, end,
                kv_head, scale, window, softcap, block_stride, head_stride, acc, total, peak,
                True, KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS,
            )  # fmt: skip
        seen = tl.maximum(seen, whole)
        acc, total, peak = _attend(
            q, keys, values, key_scales, value_scales, table, position, whole, seen, end, kv_head,
            scale, window, softcap, block_stride, head_stride, acc, total, peak,
            False, KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS,
        )  # fmt: skip
        acc, total, peak = _attend(
            q, keys, values, key_scales, value_scales, table, position, seen, end, end, kv_head,
            scale, window, softcap, block_stride, head_stride, acc, total, peak,
            True, KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIMS, KEYS,
        )  # fmt: skip

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if parts is not None and used > 1:
        part = (sequence.to(tl.int64) * QUERIES + query) * (KV_HEADS * GROUP) + head
        part = part * splits + split
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
        tl.store(sums + part, peak + tl.log2(total), mask=inside)
        return
    target = ((start + query).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
    result = result.to(out.dtype.element_ty)
    tl.store(out + target[:, None] + dims[None, :], result, mask=mask)


@triton.jit
def find_sequence(starts, sequences, tile, QUERIES: tl.constexpr):
    """The sequence of a tile, where sequence i has tiles from starts[i] // QUERIES + i on.

    The formula leaves each sequence at least as many tiles as it has use for, so that nothing is
    counted on the host (as in vLLM's unified attention kernel).
    """
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _attend(
    q,  # [ROWS, DIMS]
    keys,
    values,
    key_scales,
    value_scales,
    table,
    position,  # [ROWS] of the queries
    begin,  # a multiple of KEYS
    end,  # with begin the keys of this call; a multiple of KEYS unless MASKED
    stop,  # first key that no query of the tile sees
    kv_head,
    scale,
    window,
    softcap,
    block_stride,
    head_stride,
    acc,  # [ROWS, DIMS]: sum of weights * values
    total,  # [ROWS]: sum of weights
    peak,  # [ROWS]: largest score, in base 2
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
):
    columns = tl.arange(0, KEYS)
    dims = tl.arange(0, DIMS)
    # A tile's blocks are read while the one before is attended: loads that wait for no other load
    # of their own turn can be issued turns ahead.
    block = tl.load(table + (begin + columns) // BLOCK_SIZE, mask=begin + columns < stop, other=0)
    for from_key in tl.range(begin, end, KEYS):
        key = from_key + columns
        following = key + KEYS
        next_block = tl.load(table + following // BLOCK_SIZE, mask=following < stop, other=0)
        there = key < stop
        mask = (dims < HEAD_DIM)[None, :]
        if MASKED:
            mask = there[:, None] & mask
        block = block.to(tl.int64)
        offset = key % BLOCK_SIZE
        at = (block * block_stride + kv_head * head_stride + offset * HEAD_DIM)[:, None]
        at += dims[None, :]
        if MASKED or DIMS != HEAD_DIM:
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        scores = product(q, tl.trans(widen(k, q.dtype)))
        if key_scales is not None:
            at_scale = (block * KV_HEADS + kv_head) * BLOCK_SIZE + offset
            if MASKED:
                key_scale = tl.load(key_scales + at_scale, mask=there, other=0.0)
                value_scale = tl.load(value_scales + at_scale, mask=there, other=0.0)
            else:
                key_scale = tl.load(key_scales + at_scale)
                value_scale = tl.load(value_scales + at_scale)
            scores *= key_scale[None, :]
        factor = scale * LOG2E
        if softcap is not None:
            scores = cap(scores * (scale / softcap)) * softcap
            factor = LOG2E
        if MASKED:
            visible = key[None, :] <= position[:, None]
            if window is not None:
                visible &= key[None, :] > position[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * factor)
        base = higher
        if MASKED:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * factor - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        if value_scales is not None:
            weights *= value_scale[None, :]
        acc = product(weights.to(q.dtype), widen(v, q.dtype), acc * decay[:, None])
        peak = higher
        block = next_block
    return acc, total, peak


@triton.jit
def widen(x, dtype: tl.constexpr):
    """A tile of the cache in the dtype of the queries; bytes are e4m3."""
    if x.dtype == tl.uint8:
        x = decode_e4m3(x)
    return x.to(dtype)


@triton.jit
def product(a, b, acc=None):
    """float32 `a b + acc`; of float32 factors without rounding them to fewer bits."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def cap(x):
    """tanh(x)."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
