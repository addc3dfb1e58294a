"""Cases of attention, of what runs between the products, of sampling, adapters and block copies."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu

from bench import roofline
from bench.gpu_cases import OURS, Case, Sizes, half, randn
from shoal.kernels.gpu import activation, norm, rope
from shoal.kernels.gpu import embedding as our_embedding
from shoal.kernels.gpu.attention import AttentionBatch, paged_attention
from shoal.kernels.gpu.block_copy import BlockStore, copy_blocks
from shoal.kernels.gpu.kv_cache import KvCache, store_kv
from shoal.kernels.gpu.lora import LoraBatch, add_lora, lora_workspace
from shoal.kernels.gpu.sampling import SamplingBatch, SamplingWorkspace, sample
from shoal.kernels.measure import Launch

Prepare = Callable[[torch.device], Mapping[str, Launch]]

LONG_DECODE = "attention decode"
_KV_TYPES = {"16 bits": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_HOST_BLOCKS = 64


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from _attention_cases(sizes)
    yield from _other_cases(sizes)


def _attention_cases(sizes: Sizes) -> Iterator[Case]:
    heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
    for context in sizes.contexts:
        for batch in sizes.batches:
            if batch * context > sizes.kv_tokens:
                continue
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
    for part in slots.split(1 << 16):
        kv = randn(device, len(part), sizes.kv_heads, sizes.head_dim)
        store_kv(kv, kv, cache, part)
    return cache, tables.int()


def _decode(sizes: Sizes, batch: int, context: int, dtype: torch.dtype | None) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        cache, tables = _paged(sizes, batch, context, dtype, device)
        queries = randn(device, batch, sizes.heads, sizes.head_dim)
        rows = AttentionBatch(
            torch.arange(batch + 1, dtype=torch.int32, device=device),
            torch.full((batch,), context, dtype=torch.int32, device=device),
            tables,
            1,
            context,
        )
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


def _other_cases(sizes: Sizes) -> Iterator[Case]:
    rows, table = sizes.rows[-1], "between the products"
    name = f"{rows} rows x {sizes.hidden}"
    yield Case(table, f"add and norm {name}", roofline.norm(rows, sizes.hidden), _norm(sizes))
    yield Case(
        table,
        f"rope {rows} rows x {sizes.heads} heads",
        roofline.rope(rows, sizes.heads, sizes.head_dim),
        _rope(sizes),
    )
    yield Case(
        table,
        f"gated SiLU {rows} rows x {sizes.inner}",
        roofline.gated(rows, sizes.inner),
        _gated(sizes),
    )
    yield Case(table, f"embedding {name}", roofline.embed(rows, sizes.hidden), _embed(sizes))
    stored = roofline.store_kv(rows, sizes.kv_heads, sizes.head_dim)
    yield Case(table, f"KV store {rows} rows", stored, _store(sizes))
    for batch in sizes.batches:
        for kind in ("greedy", "top-k 50, top-p 0.9"):
            yield Case(
                "sampling",
                f"{batch} rows x {sizes.vocab}, {kind}",
                roofline.sampling(batch, sizes.vocab),
                _sample(sizes, batch, greedy=kind == "greedy"),
            )
    for rank in sizes.ranks:
        yield Case(
            "adapters",
            f"{rows} rows, 8 adapters of rank {rank}, {sizes.hidden} x {sizes.hidden}",
            roofline.lora(rows, sizes.hidden, sizes.hidden, rank, min(8, rows)),
            _lora(sizes, rank),
        )
    block = 2 * sizes.block_size * sizes.kv_heads * sizes.head_dim * 2
    yield Case(
        "block copy",
        f"{_HOST_BLOCKS} blocks of 4 layers within the device",
        roofline.block_copy(_HOST_BLOCKS, 4 * block),
        _copy(sizes),
    )


def _norm(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        residual, delta = (randn(device, sizes.rows[-1], sizes.hidden) for _ in range(2))
        weight = torch.ones(sizes.hidden, device=device)
        out, low = torch.empty_like(residual), weight.to(residual.dtype)

        def plain() -> None:
            residual.add_(delta)
            rms_norm(residual, (sizes.hidden,), low, 1e-6)

        return {
            OURS: lambda: norm.add_rms_norm(residual, delta, weight, 1e-6, residual.dtype, out=out),
            "torch add_ and rms_norm": plain,
        }

    return prepare


def _rope(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        heads = randn(device, sizes.rows[-1], sizes.heads, sizes.head_dim)
        table = randn(device, 512, sizes.head_dim, dtype=torch.float32)
        positions = torch.arange(len(heads), device=device)
        return {OURS: lambda: rope.apply_rope_(heads, table, positions, interleaved=True)}

    return prepare


def _gated(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        both = randn(device, sizes.rows[-1], 2 * sizes.inner)
        out = torch.empty(len(both), sizes.inner, device=device, dtype=both.dtype)
        gate, up = both.chunk(2, dim=1)
        return {
            OURS: lambda: activation.gated(both, "silu", out=out),
            "torch silu and product": lambda: silu(gate) * up,
        }

    return prepare


def _embed(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        table = randn(device, sizes.vocab, sizes.hidden)
        ids = torch.randint(sizes.vocab, (sizes.rows[-1],), device=device)
        return {
            OURS: lambda: our_embedding.embed(ids, table, table.dtype),
            "torch embedding": lambda: embedding(ids, table),
        }

    return prepare


def _store(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        rows = sizes.rows[-1]
        blocks = rows // sizes.block_size + 2
        cache = KvCache.allocate(
            blocks, sizes.kv_heads, sizes.block_size, sizes.head_dim, half(device), device
        )
        kv = randn(device, rows, sizes.kv_heads, sizes.head_dim)
        slots = torch.randperm(rows, device=device) + sizes.block_size
        return {OURS: lambda: store_kv(kv, kv, cache, slots)}

    return prepare


def _sample(sizes: Sizes, rows: int, *, greedy: bool) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        logits = randn(device, rows, sizes.vocab, dtype=torch.float32)
        every = partial(torch.full, (rows,), device=device)
        batch = SamplingBatch(
            slots=torch.arange(rows, device=device),
            positions=torch.arange(rows, device=device),
            greedy=every(greedy),
            temperature=every(1.0),
            top_k=every(0 if greedy else 50, dtype=torch.int32),
            top_p=every(1.0 if greedy else 0.9),
            min_p=every(0.0),
            typical_p=every(1.0),
            seeds=torch.arange(rows, device=device),
        )
        workspace = SamplingWorkspace.allocate(rows, sizes.vocab, device)
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        status = torch.empty(rows, dtype=torch.int32, device=device)

        def plain() -> Tensor:
            if greedy:
                return logits.argmax(-1)
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            kept = (ordered.cumsum(-1) - ordered < 0.9).logical_and_(_first(ordered, 50))
            noise = torch.empty_like(ordered).exponential_()
            drawn = (ordered * kept / noise).argmax(-1, keepdim=True)
            return order.gather(-1, drawn)

        return {
            OURS: lambda: sample(logits, batch, ids=ids, status=status, workspace=workspace),
            "torch argmax" if greedy else "torch sort and draw": plain,
        }

    return prepare


def _first(rows: Tensor, count: int) -> Tensor:
    return torch.arange(rows.shape[-1], device=rows.device) < count


def _lora(sizes: Sizes, rank: int) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        rows, hidden = sizes.rows[-1], sizes.hidden
        x, out = randn(device, rows, hidden), randn(device, rows, hidden)
        down, up = randn(device, 8, rank, hidden), randn(device, 8, hidden, rank)
        scales = torch.ones(8, device=device)
        batch = LoraBatch.of(torch.arange(rows) % 8, device)
        workspace = lora_workspace(rows, hidden, rank, device)
        chosen = torch.arange(rows, device=device) % 8

        def plain() -> Tensor:
            low = torch.bmm(down[chosen], x.unsqueeze(2))
            return out.add_(torch.bmm(up[chosen], low).squeeze(2))

        return {
            OURS: lambda: add_lora(out, x, down, up, scales, batch, workspace),
            "torch gather and bmm": plain,
        }

    return prepare


def _copy(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        shape = (2 * _HOST_BLOCKS, 2, sizes.kv_heads, sizes.block_size, sizes.head_dim)
        layers = [randn(device, *shape) for _ in range(4)]
        store = BlockStore.of([part for layer in layers for part in layer.unbind(1)], device)
        order = torch.randperm(_HOST_BLOCKS, device=device)
        pairs = torch.stack((order, order.flip(0) + _HOST_BLOCKS), dim=1).contiguous()

        def plain() -> None:
            for layer in layers:
                layer.index_copy_(0, pairs[:, 1], layer.index_select(0, pairs[:, 0]))

        return {OURS: lambda: copy_blocks(store, store, pairs), "torch, layer by layer": plain}

    return prepare
