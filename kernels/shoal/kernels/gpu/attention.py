"""Attention over a paged KV cache for any mix of prefill chunks, cached prefixes and decoding.

Kwon et al., "PagedAttention", 2023. The launches are those of `attention_plan`, the arithmetic is
`attention_kernel`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from shoal.kernels.gpu.attention_kernel import attention_kernel
from shoal.kernels.gpu.attention_plan import Load, Plan, Tile, plan_attention
from shoal.kernels.gpu.attention_split import merge_splits, split_workspace
from shoal.kernels.gpu.attention_tuning import attention_tunables, attention_variant, tuned
from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.configs import Tunable
from shoal.kernels.gpu.kv_cache import QUANTIZED, KvCache
from shoal.kernels.gpu.quantize import FLOATS, addressed, native_fp8
from shoal.kernels.gpu.variant import ARCHITECTURES, Variant

# Without a device to ask, as many as keep an interpreted test short.
_UNITS_OF_THE_INTERPRETER = 4
# What variants and candidates of tuning are planned for.
_UNITS_OF_A_H200 = 132
_TUNED_BLOCK = 16


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
        plan = _plan(queries, cache, batch, window)
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
    queries: Tensor, cache: KvCache, batch: AttentionBatch, window: int | None = None
) -> int:
    """float32 elements that `paged_attention` needs of a workspace for these bounds."""
    plan = _plan(queries, cache, batch, window)
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


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def load_of(queries: Tensor, kv_heads: int, batch: AttentionBatch, window: int | None) -> Load:
    return Load(
        queries.shape[1],
        kv_heads,
        batch.lengths.shape[0],
        batch.max_queries,
        batch.max_length,
        window,
    )


def _plan(queries: Tensor, cache: KvCache, batch: AttentionBatch, window: int | None) -> Plan:
    return _planned(
        load_of(queries, cache.keys.shape[1], batch, window),
        queries.shape[2],
        8 * queries.element_size(),
        8 * cache.keys.element_size(),
        queries.device,
    )


@lru_cache(maxsize=256)
def _planned(load: Load, head_dim: int, bits: int, cache_bits: int, device: torch.device) -> Plan:
    """Every layer of a step asks the same."""
    plan = plan_attention(
        load,
        head_dim,
        bits=bits,
        cache_bits=cache_bits,
        units=multiprocessors(device),
        capability=_capability(device),
    )
    return plan if bits == 32 else tuned(plan, load, head_dim, cache_bits, device)


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
    attention_kernel[(programs * tiles * splits,)](
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


def variants() -> tuple[Variant, ...]:
    """Decoding and prefill as planned for usual models, and for each kind of cache."""

    def planned(load: Load, head_dim: int, cache_bits: int, capability: int) -> Plan:
        return plan_attention(
            load,
            head_dim,
            bits=16,
            cache_bits=cache_bits,
            units=_UNITS_OF_A_H200,
            capability=capability,
        )

    def decode(
        name: str, cache: str, cache_bits: int, architectures: tuple[int, ...] = ARCHITECTURES
    ) -> Variant:
        load = Load(32, 8, 8, 1, 16384)
        plan = planned(load, 128, cache_bits, 90)
        assert plan.few is not None and plan.splits > 1, "long decoding is split"
        return attention_variant(
            name, load, 128, plan.few, True, False, cache, architectures=architectures
        )

    def prefill(
        name: str, load: Load, head_dim: int, cache: str, architectures: tuple[int, ...]
    ) -> Variant:
        special = head_dim == 256
        tile = planned(load, head_dim, 16 if cache == "*bf16" else 8, architectures[0]).many
        assert tile is not None, "a long chunk is tiled"
        return attention_variant(
            name,
            load,
            head_dim,
            tile,
            False,
            True,
            cache,
            window=special,
            softcap=special,
            architectures=architectures,
        )

    llama, gemma = Load(32, 8, 1, 2048, 2048), Load(8, 4, 1, 2048, 2048)
    return (
        decode("decode", "*bf16", 16),
        decode("decode e4m3", "*fp8e4nv", 8, (90, 100)),
        decode("decode int8", "*i8", 8),
        prefill("prefill", llama, 128, "*bf16", (90, 100)),
        prefill("prefill bytes of e4m3", llama, 128, "*u8", (80,)),
        prefill("prefill e4m3", llama, 128, "*fp8e4nv", (90, 100)),
        prefill("prefill int8", llama, 128, "*i8", (90, 100)),
        prefill("prefill window softcap", gemma, 256, "*bf16", ARCHITECTURES),
    )


def tunables() -> tuple[Tunable, ...]:
    """Tiles of decoding and of prefill."""

    def prepare(
        load: Load, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[Plan], Tensor]:
        per = load.max_length // _TUNED_BLOCK
        blocks = load.sequences * per
        cache = KvCache.allocate(blocks + 1, load.kv_heads, _TUNED_BLOCK, head_dim, dtype, device)
        tokens = load.sequences * load.max_queries
        batch = AttentionBatch(
            torch.arange(load.sequences + 1, dtype=torch.int32, device=device) * load.max_queries,
            torch.full((load.sequences,), load.max_length, dtype=torch.int32, device=device),
            (1 + torch.randperm(blocks, device=device)).view(load.sequences, per).int(),
            load.max_queries,
            load.max_length,
        )
        queries = torch.randn(tokens, load.heads, head_dim, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(queries)
        scale = head_dim**-0.5
        return lambda plan: paged_attention(queries, cache, batch, scale, out=out, plan=plan)

    def plan_of(load: Load, head_dim: int, cache_bits: int) -> Plan:
        return plan_attention(
            load, head_dim, bits=16, cache_bits=cache_bits, units=_UNITS_OF_A_H200
        )

    return attention_tunables(plan_of, prepare)
