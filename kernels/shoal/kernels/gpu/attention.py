"""Attention over a paged KV cache for any mix of prefill chunks, cached prefixes and decoding.

`softmax(q k^T * scale) v` with an online softmax in base 2 over tiles of keys that the block
table leads to (Dao, "FlashAttention-2", 2023; Kwon et al., "PagedAttention", 2023). Keys and
values of 8 bits are widened in registers: a key's scale multiplies its scores, a value's scale
its weights, so neither costs a pass over the tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.attention_plan import Load, Plan, Tile, plan_attention
from shoal.kernels.gpu.attention_split import (
    first_key,
    keys_of_a_split,
    merge_splits,
    split_workspace,
)
from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.kv_cache import QUANTIZED, KvCache
from shoal.kernels.gpu.quantize import FLOATS, addressed, decode_e4m3, native_fp8
from shoal.kernels.gpu.variant import ARCHITECTURES, Variant

_LOG2E = tl.constexpr(1.4426950408889634)
# Without a device to ask, as many as keep an interpreted test short.
_UNITS_OF_THE_INTERPRETER = 4


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Whose queries a step's tokens are, and what each sequence has in the cache."""

    query_starts: Tensor  # [sequences + 1] int32: a sequence's first token; the last is the end
    lengths: Tensor  # [sequences] int32: context with this step's tokens; 0: a padding row
    tables: Tensor  # [sequences, max_blocks] int32
    max_queries: int  # no sequence has more queries in this step
    max_length: int  # no sequence is longer

    def check(self, queries: Tensor) -> None:
        sequences = self.lengths.shape[0]
        expect("batch.query_starts", self.query_starts, (sequences + 1,), torch.int32)
        expect("batch.lengths", self.lengths, (sequences,), torch.int32)
        expect("batch.tables", self.tables, (sequences, None), torch.int32)
        expect_together(
            queries=queries,
            query_starts=self.query_starts,
            lengths=self.lengths,
            tables=self.tables,
        )


def paged_attention(
    queries: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Attention of each token over its sequence up to itself.

    queries [tokens, heads, head_dim] float, dense in the last dimension, heads a multiple of the
    cache's; query i of a sequence's n sees keys up to length - n + i, with `window` no more than
    the last `window` of them. With `softcap` a score s becomes `softcap * tanh(s / softcap)`.
    Tokens from query_starts[-1] on are no sequence's and stay unwritten.

    Returns [tokens, heads, head_dim] in the queries' dtype, in `out` (contiguous) where given;
    a query that sees nothing gives zeros. `workspace`: `attention_workspace` elements of
    float32, so that a call allocates nothing. `plan`: how to launch, else by the batch's bounds.
    """
    cache.check()
    batch.check(queries)
    kv_heads, head_dim = cache.keys.shape[1], cache.keys.shape[3]
    expect("queries", queries, (None, None, head_dim), FLOATS)
    expect_together(queries=queries, cache=cache.keys)
    tokens, heads, _ = queries.shape
    check_scores(heads, kv_heads, scale, window, softcap)
    if cache.keys.dtype not in (*QUANTIZED, queries.dtype) and queries.dtype is not torch.float32:
        raise ValueError(
            f"queries are {queries.dtype} and the cache {cache.keys.dtype}: expected one dtype, "
            f"float32 queries or a quantized cache"
        )
    out = output(out, (tokens, heads, head_dim), queries)
    sequences = batch.lengths.shape[0]
    if not tokens or not sequences:
        return out
    if plan is None:
        plan = _plan(queries, kv_heads, batch, window)
    split = split_workspace(workspace, plan, sequences, heads, head_dim, queries.device)
    if plan.many is not None:
        skip = 0 if plan.few is None else plan.few.queries
        _launch(queries, cache, batch, scale, window, softcap, out, None, plan.many, plan, skip)
    if plan.few is not None:
        _launch(queries, cache, batch, scale, window, softcap, out, split, plan.few, plan, None)
        if split is not None:
            merge_splits(*split, out, batch.query_starts, batch.lengths, window, plan)
    return out


def attention_workspace(
    queries: Tensor, kv_heads: int, batch: AttentionBatch, window: int | None = None
) -> int:
    """float32 elements that `paged_attention` needs of a workspace for these bounds."""
    plan = _plan(queries, kv_heads, batch, window)
    return plan.workspace(batch.lengths.shape[0], queries.shape[1], queries.shape[2])


def check_scores(
    heads: int, kv_heads: int, scale: float, window: int | None, softcap: float | None
) -> None:
    """Raises ValueError for what no attention means."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide among {kv_heads} key heads")
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, expected more than 0")


def output(out: Tensor | None, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    expect("out", out, shape, like.dtype, dense=3)
    expect_together(queries=like, out=out)
    return out


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _UNITS_OF_THE_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


def load_of(queries: Tensor, kv_heads: int, batch: AttentionBatch, window: int | None) -> Load:
    return Load(
        queries.shape[1],
        kv_heads,
        batch.lengths.shape[0],
        min(batch.max_queries, queries.shape[0]),
        batch.max_length,
        window,
    )


def _plan(queries: Tensor, kv_heads: int, batch: AttentionBatch, window: int | None) -> Plan:
    return plan_attention(
        load_of(queries, kv_heads, batch, window),
        queries.shape[2],
        bits=8 * queries.element_size(),
        units=multiprocessors(queries.device),
    )


def _launch(
    queries: Tensor,
    cache: KvCache,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    split: tuple[Tensor, Tensor] | None,
    tile: Tile,
    plan: Plan,
    skip: int | None,
) -> None:
    """skip: tiles of any sequence with more queries than that; None: one tile a sequence."""
    tokens, heads, head_dim = queries.shape
    _, kv_heads, block_size, _ = cache.keys.shape
    sequences = batch.lengths.shape[0]
    programs = kv_heads * triton.cdiv(heads // kv_heads, tile.heads)
    # A sequence of n queries needs cdiv(n, queries) tiles: no more than this in all.
    tiles = sequences if skip is None else tokens // tile.queries + sequences
    splits = 1 if split is None else plan.splits
    native = native_fp8(queries.device)
    _attention[(programs * tiles * splits,)](
        queries,
        addressed(cache.keys, native),
        addressed(cache.values, native),
        cache.key_scales,
        cache.value_scales,
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
        window,
        softcap,
        *queries.stride()[:2],
        batch.tables.stride(0),
        *cache.keys.stride()[:2],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIMS=max(16, triton.next_power_of_2(head_dim)),
        QUERIES=tile.queries,
        HEADS=tile.heads,
        ROWS=tile.rows,
        KEYS=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(
    do_not_specialize=["sequences", "splits", "least", "skip", "scale", "window", "softcap"]
)
def _attention(
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
    if used > 1:
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
    for from_key in tl.range(begin, end, KEYS):
        key = from_key + columns
        if MASKED:
            there = key < stop
            block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            mask = there[:, None] & (dims < HEAD_DIM)[None, :]
        else:
            block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
            mask = (dims < HEAD_DIM)[None, :]
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
        factor = scale * _LOG2E
        if softcap is not None:
            scores = cap(scores * (scale / softcap)) * softcap
            factor = _LOG2E
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
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2E)) + 1.0)


def variants() -> tuple[Variant, ...]:
    """Decoding and prefill as planned for usual models, and for each kind of cache."""
    strides = ("query_stride", "query_head_stride", "table_stride", "block_stride", "head_stride")
    counts = ("sequences", "splits", "least")

    def variant(
        name: str,
        load: Load,
        head_dim: int,
        *,
        cache: str = "*bf16",
        window: bool = False,
        softcap: bool = False,
        architectures: tuple[int, ...] = ARCHITECTURES,
    ) -> Variant:
        plan = plan_attention(load, head_dim, bits=16, units=132)
        tile = plan.few or plan.many
        assert tile is not None, "a plan has a launch"
        optional = {
            "skip": tile is plan.many,
            "window": window,
            "softcap": softcap,
            "key_scales": cache != "*bf16",
            "value_scales": cache != "*bf16",
            "parts": tile is plan.few and plan.splits > 1,
            "sums": tile is plan.few and plan.splits > 1,
        }
        kinds = {
            **dict.fromkeys(("queries", "out"), "*bf16"),
            **dict.fromkeys(("keys", "values"), cache),
            **dict.fromkeys(("key_scales", "value_scales", "parts", "sums"), "*fp32"),
            **dict.fromkeys(("starts", "lengths", "tables"), "*i32"),
            **dict.fromkeys((*counts, "skip", "window", *strides), "i32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
        }
        return Variant(
            name=f"paged_attention {name} d{head_dim}",
            kernel=_attention,
            signature={arg: kind for arg, kind in kinds.items() if optional.get(arg, True)},
            constants={
                **{arg: None for arg, there in optional.items() if not there},
                "KV_HEADS": load.kv_heads,
                "GROUP": load.group,
                "BLOCK_SIZE": 16,
                "HEAD_DIM": head_dim,
                "DIMS": triton.next_power_of_2(head_dim),
                "QUERIES": tile.queries,
                "HEADS": tile.heads,
                "ROWS": tile.rows,
                "KEYS": tile.keys,
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
            aligned=("queries", "keys", "values", "out", *strides),
            tensor_cores=True,
            wgmma=tile.rows >= 64,
            architectures=architectures,
        )

    decode = Load(32, 8, 8, 1, 16384)
    prefill = Load(32, 8, 1, 2048, 2048)
    return (
        variant("decode", decode, 128),
        variant("decode e4m3", decode, 128, cache="*fp8e4nv", architectures=(90, 100)),
        variant("decode int8", decode, 128, cache="*i8"),
        variant("prefill", prefill, 128),
        variant("prefill e4m3 bytes", prefill, 128, cache="*u8"),
        variant(
            "prefill window softcap", Load(8, 4, 1, 2048, 2048), 256, window=True, softcap=True
        ),
    )
