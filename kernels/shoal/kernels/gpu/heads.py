"""What lies between the projection of a token's heads and its attention, in one launch: the norm
of queries and keys, rope, and the store of keys and values.

The same arithmetic, roundings included, as `norm_heads_`, `apply_rope_` and `store_kv` one after
the other, which are its oracle. A decode step of a small model is bound by its number of launches.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.checks import expect, expect_together
from shoal.kernels.gpu.kv_cache import LIMITS, KvCache, as_bytes, put_rows
from shoal.kernels.gpu.quantize import FLOATS
from shoal.kernels.gpu.variant import Variant

_TILE = 2048  # elements of the heads of one program
_WARPS = 4


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Root-mean-square norms of each head of queries and keys."""

    queries: Tensor  # [head_dim] float32
    keys: Tensor  # [head_dim] float32
    eps: float


@triton.jit
def _heads_kernel(
    heads_ptr,  # [tokens, queries + 2 * kv_heads, HEAD_DIM]
    query_weight,  # [HEAD_DIM], none without norms
    key_weight,
    table_ptr,  # [positions, 2 * PAIRS], none without rope
    positions_ptr,  # [tokens]
    key_cache,  # [blocks, kv_heads, BLOCK_SIZE, HEAD_DIM]
    value_cache,
    key_scales,  # [blocks, kv_heads, BLOCK_SIZE] or none
    value_scales,
    slots_ptr,  # [tokens]
    queries,
    kv_heads,
    eps,
    token_stride,
    block_stride,
    head_stride,
    LIMIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,  # that rope turns
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, DIMS)
    inside = (head < queries + 2 * kv_heads)[:, None] & (at < HEAD_DIM)[None, :]
    pointers = heads_ptr + token * token_stride + head[:, None] * HEAD_DIM + at[None, :]
    x = tl.load(pointers, mask=inside, other=0.0)
    kind = heads_ptr.dtype.element_ty
    turned = (head < queries + kv_heads)[:, None]  # queries and keys
    if query_weight is not None:
        wide = x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + eps)
        of_queries = tl.load(query_weight + at, mask=at < HEAD_DIM, other=0.0).to(tl.float32)
        of_keys = tl.load(key_weight + at, mask=at < HEAD_DIM, other=0.0).to(tl.float32)
        weight = tl.where((head < queries)[:, None], of_queries[None, :], of_keys[None, :])
        x = tl.where(turned, (wide * inverse[:, None] * weight).to(kind), x)
    if table_ptr is not None:
        # Beyond the pairs that turn the angle is zero.
        pair = tl.arange(0, DIMS // 2)
        turns = table_ptr + tl.load(positions_ptr + token) * (2 * PAIRS)
        cosine = tl.load(turns + pair, mask=pair < PAIRS, other=1.0)[None, :]
        sine = tl.load(turns + PAIRS + pair, mask=pair < PAIRS, other=0.0)[None, :]
        first, second = tl.split(tl.reshape(x.to(tl.float32), (HEADS, DIMS // 2, 2)))
        both = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        x = tl.where(turned, tl.reshape(both, (HEADS, DIMS)).to(kind), x)
    tl.store(pointers, x, mask=inside & (head < queries)[:, None])
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key = head - queries
    value = key - kv_heads
    is_key = (key >= 0) & (key < kv_heads)
    is_value = (value >= 0) & (value < kv_heads)
    row = block * block_stride + offset * HEAD_DIM
    scale = block * kv_heads * BLOCK_SIZE + offset
    put_rows(
        x,
        key_cache,
        row + key * head_stride,
        key_scales,
        scale + key * BLOCK_SIZE,
        is_key,
        LIMIT,
        HEAD_DIM,
        DIMS,
    )
    put_rows(
        x,
        value_cache,
        row + value * head_stride,
        value_scales,
        scale + value * BLOCK_SIZE,
        is_value,
        LIMIT,
        HEAD_DIM,
        DIMS,
    )


def store_heads_(
    heads: Tensor,
    cache: KvCache,
    slots: Tensor,
    *,
    norms: HeadNorms | None = None,
    table: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Norms queries and keys where `norms` are given, turns both where a rope `table` is, writes
    keys and values to the cache, and returns the queries [tokens, queries, head_dim], a view.

    heads [tokens, queries + 2 * kv_heads, head_dim] float, queries first, then keys, then values,
    each token dense: the queries change in place, the rest stays. table [positions, rotary_dim]
    float32, as `apply_rope_` takes it for interleaved pairs, with positions [tokens] int64. slots
    [tokens] int64 as for `store_kv`; a token without one is left as it is, queries included.
    Raises ValueError for tensors that do not fit.
    """
    cache.check()
    _, kv_heads, block_size, head_dim = cache.keys.shape
    expect("heads", heads, (None, None, head_dim), FLOATS, dense=2)
    tokens, count, _ = heads.shape
    queries = count - 2 * kv_heads
    if queries <= 0 or head_dim % 2:
        raise ValueError(
            f"heads has {count} of {head_dim}, expected more than the {2 * kv_heads} of keys and "
            f"values, of an even size"
        )
    expect("slots", slots, (tokens,), torch.int64)
    expect_together(heads=heads, slots=slots, cache=cache.keys)
    if norms is not None:
        for name, weight in (("norms.queries", norms.queries), ("norms.keys", norms.keys)):
            expect(name, weight, (head_dim,), FLOATS)
    if (table is None) != (positions is None):
        raise ValueError("table and positions: expected both or none of them")
    if table is not None and positions is not None:
        expect("table", table, (None, None), torch.float32, dense=2)
        expect("positions", positions, (tokens,), torch.int64)
        expect_together(heads=heads, table=table, positions=positions)
        if table.shape[1] % 2 or not 0 < table.shape[1] <= head_dim:
            raise ValueError(
                f"table turns {table.shape[1]} elements, expected an even number from 2 to the "
                f"{head_dim} of a head"
            )
    if tokens:
        dims = triton.next_power_of_2(head_dim)
        together = max(1, min(triton.next_power_of_2(count), _TILE // dims))
        _heads_kernel[(tokens, triton.cdiv(count, together))](
            heads,
            None if norms is None else norms.queries,
            None if norms is None else norms.keys,
            table,
            positions,
            as_bytes(cache.keys),
            as_bytes(cache.values),
            cache.key_scales,
            cache.value_scales,
            slots,
            queries,
            kv_heads,
            0.0 if norms is None else norms.eps,
            heads.stride(0),
            *cache.keys.stride()[:2],
            LIMIT=LIMITS.get(cache.keys.dtype),
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            PAIRS=0 if table is None else table.shape[1] // 2,
            HEADS=together,
            DIMS=dims,
            num_warps=_WARPS,
        )
    return heads[:, :queries]


def variants() -> tuple[Variant, ...]:
    """Of a model with norms of heads, for each kind of cache, and of one without."""
    sizes = ("queries", "kv_heads", "token_stride", "block_stride", "head_stride")
    caches = {"bf16": ("*bf16", None), "int8": ("*i8", 127.0), "e4m3": ("*u8", 448.0)}

    def variant(name: str, dims: int, normed: bool) -> Variant:
        kind, limit = caches[name]
        weights = ("query_weight", "key_weight")
        scales = ("key_scales", "value_scales")
        none = ((not normed) * weights) + ((limit is None) * scales)
        pointers = {
            "heads_ptr": "*bf16",
            **dict.fromkeys(weights, "*fp32"),
            "table_ptr": "*fp32",
            "positions_ptr": "*i64",
            **dict.fromkeys(("key_cache", "value_cache"), kind),
            **dict.fromkeys(scales, "*fp32"),
            "slots_ptr": "*i64",
        }
        return Variant(
            name=f"store_heads_ bf16 to {name} d{dims}" + (" normed" if normed else ""),
            kernel=_heads_kernel,
            signature={
                **{each: type_ for each, type_ in pointers.items() if each not in none},
                **dict.fromkeys(sizes[:2], "i32"),
                "eps": "fp32",
                **dict.fromkeys(sizes[2:], "i32"),
            },
            constants={
                **dict.fromkeys(none),
                "LIMIT": limit,
                "BLOCK_SIZE": 16,
                "HEAD_DIM": dims,
                "PAIRS": dims // 2,
                "HEADS": _TILE // dims,
                "DIMS": dims,
            },
            num_warps=_WARPS,
            aligned=(*(each for each in pointers if each not in none), *sizes[2:]),
        )

    return (
        *(variant(name, 128, True) for name in caches),
        variant("bf16", 64, False),
    )
