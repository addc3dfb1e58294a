"""Attention over the paged latents of multi-head latent attention, in its absorbed form.

DeepSeek-V2, 2024, section 2.1: a token's keys and values of all heads are projections of one
latent. With the projections folded into the queries and the output, every head attends over the
same rows: `softmax((q_c c^T + q_r r^T) * scale) c`, where a row is a latent c and a rotated key r.
A tile of rows is read once, as keys and as values. Splits and tiles are those of
`paged_attention` with one key head.
"""

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.attention import (
    AttentionBatch,
    check_scores,
    load_of,
    multiprocessors,
    output,
)
from shoal.kernels.gpu.attention_kernel import LOG2E, find_sequence, product
from shoal.kernels.gpu.attention_plan import Load, Plan, Tile, plan_latent
from shoal.kernels.gpu.attention_split import keys_of_a_split, merge_splits, split_workspace
from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.variant import Variant


def latent_attention(
    queries: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    kv_rank: int,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Causal attention of each token's heads over the latents of its sequence up to itself.

    queries [tokens, heads, kv_rank + rope_dim] float, dense in the last dimension: the absorbed
    part, then the rotated one; cache [num_blocks, block_size, kv_rank + rope_dim] of their dtype
    (see `store_latent`). Batch, `out`, `workspace` and rows that see nothing: as for
    `paged_attention`, the workspace's size by `latent_workspace`.

    Returns [tokens, heads, kv_rank] in the queries' dtype.
    """
    batch.check(queries)
    expect("queries", queries, (None, None, None), FLOATS)
    tokens, heads, width = queries.shape
    expect("cache", cache, (None, None, width), queries.dtype, dense=2)
    expect_together(queries=queries, cache=cache)
    check_scores(heads, 1, scale, None, None)
    if not 0 < kv_rank < width:
        raise ValueError(f"kv_rank is {kv_rank}, expected from 1 to below the rows' {width}")
    out = output(out, (tokens, heads, kv_rank), queries)
    sequences = batch.lengths.shape[0]
    if not tokens or not sequences:
        return out
    if plan is None:
        plan = _plan(queries, batch)
    split = split_workspace(workspace, plan, sequences, heads, kv_rank, queries.device)
    if plan.many is not None:
        skip = 0 if plan.few is None else plan.few.queries
        _launch(queries, cache, batch, scale, kv_rank, out, None, plan.many, plan, skip)
    if plan.few is not None:
        _launch(queries, cache, batch, scale, kv_rank, out, split, plan.few, plan, None)
        if split is not None:
            merge_splits(*split, out, batch.query_starts, batch.lengths, None, plan)
    return out


def latent_workspace(queries: Tensor, batch: AttentionBatch, kv_rank: int) -> int:
    """float32 elements that `latent_attention` needs of a workspace for these bounds."""
    plan = _plan(queries, batch)
    return plan.workspace(batch.lengths.shape[0], queries.shape[1], kv_rank)


def _plan(queries: Tensor, batch: AttentionBatch) -> Plan:
    return plan_latent(
        load_of(queries, 1, batch, None),
        bits=8 * queries.element_size(),
        units=multiprocessors(queries.device),
    )


def _launch(
    queries: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    kv_rank: int,
    out: Tensor,
    split: tuple[Tensor, Tensor] | None,
    tile: Tile,
    plan: Plan,
    skip: int | None,
) -> None:
    """skip: as in paged attention."""
    tokens, heads, width = queries.shape
    sequences = batch.lengths.shape[0]
    tiles = sequences if skip is None else tokens // tile.queries + sequences
    splits = 1 if split is None else plan.splits
    _attention[(triton.cdiv(heads, tile.heads) * tiles * splits,)](
        queries,
        cache,
        out,
        *(split or (None, None)),
        batch.query_starts,
        batch.lengths,
        batch.tables,
        sequences,
        splits,
        plan.least_keys,
        skip,
        scale,
        *queries.stride()[:2],
        batch.tables.stride(0),
        cache.stride(0),
        GROUP=heads,
        BLOCK_SIZE=cache.shape[1],
        RANK=kv_rank,
        ROPE=width - kv_rank,
        RANKS=_padded(kv_rank),
        ROPES=_padded(width - kv_rank),
        QUERIES=tile.queries,
        HEADS=tile.heads,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _padded(width: int) -> int:
    """The next size that a matrix instruction takes."""
    size: int = triton.next_power_of_2(width)
    return max(16, size)


@triton.jit(do_not_specialize=["sequences", "splits", "least", "skip", "scale", "table_stride"])
def _attention(
    queries,  # [tokens, GROUP, RANK + ROPE]
    cache,  # [blocks, BLOCK_SIZE, RANK + ROPE]
    out,  # [tokens, GROUP, RANK]
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
    query_stride,
    query_head_stride,
    table_stride,
    block_stride,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANKS: tl.constexpr,
    ROPES: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    WIDTH: tl.constexpr = RANK + ROPE
    head_tile = tl.program_id(0) % HEAD_TILES
    index = tl.program_id(0) // HEAD_TILES
    if skip is None:
        sequence, split = index // splits, index % splits
        first = 0
    else:
        # Late tiles see the most keys: they go first, so that short ones fill the gaps.
        tile = tl.num_programs(0) // HEAD_TILES - 1 - index
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
    begin = 0
    stop = tl.maximum(context + tl.minimum(first + QUERIES, count), 0)
    end = stop
    used = 1
    if parts is not None:
        share = keys_of_a_split(stop, splits, least, KEYS)
        used = tl.cdiv(stop, share)
        if split >= tl.maximum(used, 1):
            return
        begin += split * share
        end = tl.minimum(stop, begin + share)

    rows = tl.arange(0, ROWS)
    dims, turned = tl.arange(0, RANKS), tl.arange(0, ROPES)
    query = first + rows // HEADS
    head = head_tile * HEADS + rows % HEADS
    inside = (rows < QUERIES * HEADS) & (query < count) & (head < GROUP)
    row = (start + query).to(tl.int64) * query_stride + head * query_head_stride
    mask = inside[:, None] & (dims < RANK)[None, :]
    turned_mask = inside[:, None] & (turned < ROPE)[None, :]
    q = tl.load(queries + row[:, None] + dims[None, :], mask=mask, other=0.0)
    q_turned = tl.load(queries + row[:, None] + RANK + turned[None, :], mask=turned_mask, other=0.0)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    table = tables + sequence.to(tl.int64) * table_stride
    position = context + query
    factor = scale * LOG2E
    columns = tl.arange(0, KEYS)
    # A tile's blocks are read while the one before is attended: see paged attention.
    block = tl.load(table + (begin + columns) // BLOCK_SIZE, mask=begin + columns < stop, other=0)
    for from_key in tl.range(begin, end, KEYS):
        key = from_key + columns
        following = key + KEYS
        next_block = tl.load(table + following // BLOCK_SIZE, mask=following < stop, other=0)
        there = (key < stop)[:, None]
        at = (block.to(tl.int64) * block_stride + key % BLOCK_SIZE * WIDTH)[:, None]
        latent = tl.load(cache + at + dims[None, :], mask=there & (dims < RANK)[None, :], other=0.0)
        rotated = tl.load(
            cache + at + RANK + turned[None, :], mask=there & (turned < ROPE)[None, :], other=0.0
        )
        scores = product(q, tl.trans(latent))
        scores = product(q_turned, tl.trans(rotated), scores)
        visible = key[None, :] <= position[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * factor)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * factor - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        acc = product(weights.to(latent.dtype), latent, acc * decay[:, None])
        peak = higher
        block = next_block

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if parts is not None and used > 1:
        part = (sequence.to(tl.int64) * QUERIES + query) * GROUP + head
        part = part * splits + split
        tl.store(parts + part[:, None] * RANK + dims[None, :], result, mask=mask)
        tl.store(sums + part, peak + tl.log2(total), mask=inside)
        return
    target = ((start + query).to(tl.int64) * GROUP + head) * RANK
    result = result.to(out.dtype.element_ty)
    tl.store(out + target[:, None] + dims[None, :], result, mask=mask)


def variants() -> tuple[Variant, ...]:
    """Decoding with the heads of DeepSeek-V2-Lite and V3, and V3's prefill."""
    strides = ("query_stride", "query_head_stride", "block_stride")

    def variant(name: str, load: Load) -> Variant:
        plan = plan_latent(load, bits=16, units=132)
        tile = plan.few or plan.many
        assert tile is not None, "a plan has a launch"
        absent = ("skip",) if tile is plan.few else ("parts", "sums")
        kinds = {
            **dict.fromkeys(("queries", "cache", "out"), "*bf16"),
            **dict.fromkeys(("parts", "sums"), "*fp32"),
            **dict.fromkeys(("starts", "lengths", "tables"), "*i32"),
            **dict.fromkeys(
                ("sequences", "splits", "least", "skip", "table_stride", *strides), "i32"
            ),
            "scale": "fp32",
        }
        return Variant(
            name=f"latent_attention {name}",
            kernel=_attention,
            signature={arg: kind for arg, kind in kinds.items() if arg not in absent},
            constants={
                **dict.fromkeys(absent),
                "GROUP": load.heads,
                "BLOCK_SIZE": 64,
                "RANK": 512,
                "ROPE": 64,
                "RANKS": 512,
                "ROPES": 64,
                "QUERIES": tile.queries,
                "HEADS": tile.heads,
                "ROWS": tile.rows,
                "KEYS": tile.keys,
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
            aligned=("queries", "cache", "out", *strides),
            tensor_cores=True,
            wgmma=tile.rows >= 64,
        )

    return (
        variant("decode 16 heads", Load(16, 1, 8, 1, 16384)),
        variant("decode 128 heads", Load(128, 1, 8, 1, 16384)),
        variant("prefill 128 heads", Load(128, 1, 1, 512, 512)),
    )
