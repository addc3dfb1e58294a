"""Cases of what runs between the products, of sampling, adapters and block copies."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from bench import roofline
from bench.gpu_cases import OURS, Case, Sizes, half, randn
from shoal.kernels.gpu import activation, norm, rope
from shoal.kernels.gpu import embedding as our_embedding
from shoal.kernels.gpu.block_copy import BlockStore, copy_blocks
from shoal.kernels.gpu.heads import HeadNorms, store_heads_
from shoal.kernels.gpu.kv_cache import KvCache, store_kv
from shoal.kernels.gpu.logprobs import logprobs
from shoal.kernels.gpu.lora import LoraBatch, add_lora, lora_workspace
from shoal.kernels.gpu.sampling import SamplingBatch, SamplingWorkspace, sample
from shoal.kernels.measure import Launch

Prepare = Callable[[torch.device], Mapping[str, Launch]]

_BLOCKS = 64


def cases(sizes: Sizes) -> Iterator[Case]:
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
    yield Case(
        table,
        f"norms of heads, rope and KV store {rows} rows",
        roofline.rope(rows, sizes.heads, sizes.head_dim) + stored,
        _heads(sizes),
    )
    for batch in sizes.batches:
        for kind in ("greedy", "top-k 50, top-p 0.9"):
            yield Case(
                "sampling",
                f"{batch} rows x {sizes.vocab}, {kind}",
                roofline.sampling(batch, sizes.vocab),
                _sample(sizes, batch, greedy=kind == "greedy"),
            )
    yield Case(
        "sampling",
        f"{rows} rows x {sizes.vocab}, logprobs of 5",
        roofline.sampling(rows, sizes.vocab),
        _logprobs(sizes),
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
        f"{_BLOCKS} blocks of 4 layers within the device",
        roofline.block_copy(_BLOCKS, 4 * block),
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


def _heads(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        rows, dim = sizes.rows[-1], sizes.head_dim
        cache = KvCache.allocate(
            rows // sizes.block_size + 2,
            sizes.kv_heads,
            sizes.block_size,
            dim,
            half(device),
            device,
        )
        heads = randn(device, rows, sizes.heads + 2 * sizes.kv_heads, dim)
        slots = torch.randperm(rows, device=device) + sizes.block_size
        table = randn(device, 512, dim, dtype=torch.float32)
        positions = torch.arange(rows, device=device)
        norms = HeadNorms(torch.ones(dim, device=device), torch.ones(dim, device=device), 1e-6)
        return {
            OURS: lambda: store_heads_(
                heads, cache, slots, norms=norms, table=table, positions=positions
            )
        }

    return prepare


def _logprobs(sizes: Sizes) -> Prepare:
    def prepare(device: torch.device) -> dict[str, Launch]:
        logits = randn(device, sizes.rows[-1], sizes.vocab, dtype=torch.float32)
        ids = torch.randint(sizes.vocab, (len(logits),), device=device)

        def plain() -> tuple[Tensor, Tensor]:
            found = logits.log_softmax(-1)
            chosen = found.gather(-1, ids.unsqueeze(1))
            return (found > chosen).sum(-1), found.topk(5).values

        return {OURS: lambda: logprobs(logits, ids, 5), "torch log_softmax and topk": plain}

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
        shape = (2 * _BLOCKS, 2, sizes.kv_heads, sizes.block_size, sizes.head_dim)
        layers = [randn(device, *shape) for _ in range(4)]
        store = BlockStore.of([part for layer in layers for part in layer.unbind(1)], device)
        order = torch.randperm(_BLOCKS, device=device)
        pairs = torch.stack((order, order.flip(0) + _BLOCKS), dim=1).contiguous()

        def plain() -> None:
            for layer in layers:
                layer.index_copy_(0, pairs[:, 1], layer.index_select(0, pairs[:, 0]))

        return {OURS: lambda: copy_blocks(store, store, pairs), "torch, layer by layer": plain}

    return prepare
