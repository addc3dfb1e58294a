"""One launch against the three that it stands for."""

import pytest
import torch
from torch import Tensor

from shoal.kernels.gpu.heads import HeadNorms, store_heads_
from shoal.kernels.gpu.kv_cache import KvCache, store_kv
from shoal.kernels.gpu.norm import norm_heads_
from shoal.kernels.gpu.rope import apply_rope_, cos_sin_table
from shoal.kernels.rope import rope_table

EPS = 1e-6


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def parts_of(cache: KvCache) -> list[Tensor]:
    parts = [cache.keys, cache.values, cache.key_scales, cache.value_scales]
    return [part.float().cpu() for part in parts if part is not None]


@pytest.mark.parametrize(
    ("queries", "kv_heads", "head_dim", "rotary_dim", "normed"),
    [(4, 2, 16, 16, True), (3, 1, 24, 8, False), (9, 3, 64, 64, True), (2, 2, 16, 0, True)],
)
@pytest.mark.parametrize("kind", ["float", "int8", "fp8"])
def test_it_does_what_norm_rope_and_store_do(
    queries: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    normed: bool,
    kind: str,
    device: torch.device,
    float_types: tuple[torch.dtype, ...],
) -> None:
    """Queries and caches of every kind, heads of any size, tokens without a place among them."""
    codes = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    slots = torch.tensor([37, -1, 16, 63], device=device)
    positions = torch.tensor([5, 0, 11, 3], device=device)
    norms = HeadNorms(random(head_dim).to(device), 2 * random(head_dim).to(device), EPS)
    table = None
    if rotary_dim:
        steps = torch.arange(rotary_dim // 2) / rotary_dim
        table = cos_sin_table(rope_table(100.0**-steps, 12)).to(device)
    for dtype in float_types:
        found = random(4, queries + 2 * kv_heads, head_dim, dtype=dtype).to(device)
        wanted = found.clone()
        shape = (4, kv_heads, 16, head_dim, codes.get(kind, dtype), device)
        cache, reference = KvCache.allocate(*shape), KvCache.allocate(*shape)
        keys = queries + kv_heads
        if normed:
            norm_heads_(wanted[:, :queries], norms.queries, EPS)
            norm_heads_(wanted[:, queries:keys], norms.keys, EPS)
        if table is not None:
            apply_rope_(wanted[:, :keys], table, positions, interleaved=True)
        store_kv(wanted[:, queries:keys], wanted[:, keys:], reference, slots)
        wanted[1], wanted[:, queries:] = found[1], found[:, queries:]
        turned = store_heads_(
            found,
            cache,
            slots,
            norms=norms if normed else None,
            table=table,
            positions=None if table is None else positions,
        )
        # Fused multiplications may round another way on a GPU: a step of the type at most.
        step = torch.finfo(dtype).eps * 4
        assert turned.shape == (4, queries, head_dim)
        torch.testing.assert_close(found, wanted, rtol=step, atol=step)
        coded = {"int8": 1.0, "fp8": 32.0}.get(kind, step)
        for part, other in zip(parts_of(cache), parts_of(reference), strict=True):
            torch.testing.assert_close(part, other, rtol=step, atol=coded)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """No queries beside the keys and values, or a table without positions."""
    cache = KvCache.allocate(2, 2, 16, 8, torch.float32, device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="heads has 4 of 8, expected more than the 4 of keys"):
        store_heads_(torch.zeros(1, 4, 8, device=device), cache, slots)
    with pytest.raises(ValueError, match="expected both or none"):
        store_heads_(torch.zeros(1, 5, 8, device=device), cache, slots, positions=slots)
