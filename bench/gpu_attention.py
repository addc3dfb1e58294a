"""Cases of attention: over a paged cache, over latents, and what torch has for the same."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench import roofline
from bench.gpu_cases import OURS, Case, Sizes, half, randn
from shoal.kernels.gpu.attention import AttentionBatch, paged_attention
from shoal.kernels.gpu.kv_cache import KvCache, store_kv
from shoal.kernels.gpu.latent_attention import latent_attention
from shoal.kernels.measure import Launch

Prepare = Callable[[torch.device], Mapping[str, Launch]]

LONG_DECODE = "attention decode"
_KV_TYPES = {"16 bits": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def cases(sizes: Sizes) -> Iterator[Case]:
    heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
    for context in sizes.contexts:
        for batch in sizes.batches:
            if batch * context > sizes.kv_tokens:
                continue
            yield Case(
                "latent attention decode",
                f"{batch} x {context} tokens",
                roofline.latent_attention(context, *sizes.latent, sequences=batch),
                _latent(sizes, batch, context),
            )
            for kind, dtype in _KV_TYPES.items():
                size = 2 if dtype is None else 1
                yield Case(
                    LONG_DECODE,
                    f"{batch} x {context} tokens, KV {kind}",
                    roofline.attention(1, context, *heads, sequences=batch, kv_size=size),
                    _decode(sizes, batch, context, dtype),
                )
    yield Case(
        "attention prefill",
        f"{sizes.prompt} tokens",
        roofline.attention(sizes.prompt, sizes.prompt, *heads),
        _prefill(sizes),
    )


def _paged(
    sizes: Sizes, batch: int, context: int, dtype: torch.dtype | None, device: torch.device
) -> tuple[KvCache, Tensor]:
    """A filled cache, and tables in which no sequence's blocks lie in order."""
    per = -(-context // sizes.block_size)
    kind = half(device) if dtype is None else dtype
    cache = KvCache.allocate(
        batch * per + 1, sizes.kv_heads, sizes.block_size, sizes.head_dim, kind, device
    )
    tables = 1 + torch.randperm(batch * per, device=device).view(batch, per)
    slots = torch.arange(cache.keys.shape[0] * sizes.block_size, device=device)
    for part in torch.split(slots, 1 << 16):
        kv = randn(device, len(part), sizes.kv_heads, sizes.head_dim)
        store_kv(kv, kv, cache, part)
    return cache, tables.int()


def _decode(sizes: Sizes, batch: int, context: int, dtype: torch.dtype | None) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        cache, tables = _paged(sizes, batch, context, dtype, device)
        queries = randn(device, batch, sizes.heads, sizes.head_dim)
        rows = _one_query_each(batch, context, tables)
        out = torch.empty_like(queries)
        scale = sizes.head_dim**-0.5
        launches: dict[str, Launch] = {
            OURS: lambda: paged_attention(queries, cache, rows, scale, out=out)
        }
        if dtype is None:
            keys = randn(device, batch, sizes.kv_heads, context, sizes.head_dim)
            single = queries.unsqueeze(2)
            launches["scaled_dot_product_attention, KV in one piece"] = lambda: (
                scaled_dot_product_attention(single, keys, keys, enable_gqa=True)
            )
        return launches

    return prepare


def _latent(sizes: Sizes, batch: int, context: int) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        heads, rank, rotary = sizes.latent
        per = -(-context // sizes.block_size)
        cache = torch.zeros(
            batch * per + 1, sizes.block_size, rank + rotary, dtype=half(device), device=device
        ).normal_()
        tables = 1 + torch.randperm(batch * per, device=device).view(batch, per)
        queries = randn(device, batch, heads, rank + rotary)
        rows = _one_query_each(batch, context, tables.int())
        out = torch.empty(batch, heads, rank, dtype=queries.dtype, device=device)
        scale = (rank + rotary) ** -0.5
        return {OURS: lambda: latent_attention(queries, cache, rows, scale, rank, out=out)}

    return prepare


def _one_query_each(batch: int, context: int, tables: Tensor) -> AttentionBatch:
    device = tables.device
    return AttentionBatch(
        torch.arange(batch + 1, dtype=torch.int32, device=device),
        torch.full((batch,), context, dtype=torch.int32, device=device),
        tables,
        1,
        context,
    )


def _prefill(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        tokens = sizes.prompt
        cache, tables = _paged(sizes, 1, tokens, None, device)
        queries = randn(device, tokens, sizes.heads, sizes.head_dim)
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        rows = AttentionBatch(ends, ends[1:], tables, tokens, tokens)
        out = torch.empty_like(queries)
        scale = sizes.head_dim**-0.5
        keys = randn(device, 1, sizes.kv_heads, tokens, sizes.head_dim)
        dense = queries.transpose(0, 1).unsqueeze(0)
        return {
            OURS: lambda: paged_attention(queries, cache, rows, scale, out=out),
            "scaled_dot_product_attention": lambda: scaled_dot_product_attention(
                dense, keys, keys, is_causal=True, enable_gqa=True
            ),
            "flex_attention": _flex(dense, keys),
        }

    return prepare


def _flex(queries: Tensor, keys: Tensor) -> Launch:
    """torch.compile makes its kernel on a GPU; elsewhere it runs as it is written."""
    tokens, device = queries.shape[2], queries.device

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, tokens, tokens, device=str(device))
    call = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    return lambda: call(queries, keys, keys, block_mask=mask, enable_gqa=True)
