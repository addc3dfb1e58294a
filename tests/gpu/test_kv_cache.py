"""What the store kernel leaves in a paged cache."""

import pytest
import torch
from torch import Tensor

from shoal.kernels.gpu.kv_cache import QUANTIZED, KvCache, store_kv, store_latent

CANARY = 77.0
TOKENS = 5
# Token 2 is a graph's padding.
SLOTS = (19, 4, -1, 63, 32)


def slots(device: torch.device) -> Tensor:
    return torch.tensor(SLOTS, dtype=torch.int64, device=device)


def rows(cache: Tensor) -> Tensor:
    """[blocks, kv_heads, block_size, ...] -> the rows of stored tokens, [4, kv_heads, ...]."""
    at = torch.tensor([slot for slot in SLOTS if slot >= 0], device=cache.device)
    return cache.transpose(1, 2).flatten(0, 1)[at]


def draw(kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(kv_heads * head_dim)
    return torch.randn(TOKENS, kv_heads, head_dim, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 80), (8, 16)])
def test_tokens_land_in_their_slots_and_nowhere_else(
    device: torch.device, float_types: tuple[torch.dtype, ...], kv_heads: int, head_dim: int
) -> None:
    """Odd counts of heads and sizes; a negative slot stores nothing; keys may be a slice."""
    for dtype in float_types:
        cache = KvCache.allocate(4, kv_heads, 16, head_dim, dtype, device)
        cache.keys.fill_(CANARY)
        cache.values.fill_(CANARY)
        joined = draw(2 * kv_heads, head_dim, dtype, device)
        keys, values = joined[:, :kv_heads], joined[:, kv_heads:]
        store_kv(keys, values, cache, slots(device))
        for stored, given in ((cache.keys, keys), (cache.values, values)):
            expected = given[[0, 1, 3, 4]]
            torch.testing.assert_close(rows(stored), expected, atol=0, rtol=0)
            assert (stored == CANARY).sum() == stored.numel() - expected.numel()


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_quantized_rows_are_their_codes_times_their_scales(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    """Each token and head has the scale of its largest element; a row of zeros stays zero."""
    cache = KvCache.allocate(4, 3, 16, head_dim, dtype, device)
    keys = draw(3, head_dim, torch.float32, device)
    keys[1, 2] = 0
    keys[3, 0] *= 1e4
    values = keys.flip(0).clone()
    store_kv(keys, values, cache, slots(device))
    limit = 127.0 if dtype is torch.int8 else 448.0
    for codes, scales, given in (
        (cache.keys, cache.key_scales, keys),
        (cache.values, cache.value_scales, values),
    ):
        assert scales is not None
        kept = given[[0, 1, 3, 4]]
        largest = kept.abs().amax(-1)
        torch.testing.assert_close(rows(scales), largest / limit)
        got = rows(codes.float() * scales[..., None])
        # Half a step of int8; half of the last of e4m3's three bits, or of its smallest step.
        if dtype is torch.int8:
            bound = (largest / limit)[..., None] * 0.5
        else:
            bound = torch.maximum(kept.abs() / 16, (largest / limit)[..., None] * 2**-10)
        assert ((got - kept).abs() <= bound * 1.001).all()


def test_a_float16_cache_saturates(device: torch.device) -> None:
    """Keys of a wider type beyond its range become its largest value, not infinity."""
    cache = KvCache.allocate(4, 1, 16, 16, torch.float16, device)
    keys = torch.full((TOKENS, 1, 16), -1e6, device=device)
    store_kv(keys, -keys, cache, slots(device))
    assert (rows(cache.keys) == -65504).all() and (rows(cache.values) == 65504).all()


@pytest.mark.parametrize("dtype", [*QUANTIZED, torch.float16])
def test_a_nan_is_not_hidden(device: torch.device, dtype: torch.dtype) -> None:
    """A key that is not a number stays one: by its scale, where the codes cannot say so."""
    cache = KvCache.allocate(4, 2, 16, 16, dtype, device)
    keys = draw(2, 16, torch.float32, device)
    keys[0, 1, 3] = float("nan")
    store_kv(keys, keys, cache, slots(device))
    told = cache.keys[..., 3] if cache.key_scales is None else cache.key_scales
    assert rows(told).isnan().tolist() == [[False, True], *[[False, False]] * 3]


def test_latents_are_stored_as_they_are(device: torch.device) -> None:
    """One row a token, without heads."""
    cache = torch.full((4, 16, 40), CANARY, device=device)
    latent = draw(1, 40, torch.float32, device)[:, 0]
    store_latent(latent, cache, slots(device))
    torch.testing.assert_close(rows(cache.unsqueeze(1))[:, 0], latent[[0, 1, 3, 4]], atol=0, rtol=0)
    assert (cache == CANARY).sum() == cache.numel() - 4 * 40


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """A dtype without a cache, scales where none belong, slots of the wrong type."""
    with pytest.raises(ValueError, match=r"a KV cache of torch.int32 is not supported"):
        KvCache.allocate(4, 1, 16, 16, torch.int32, device)
    plain = KvCache.allocate(4, 1, 16, 16, torch.float32, device)
    coded = KvCache.allocate(4, 1, 16, 16, torch.int8, device)
    keys = draw(1, 16, torch.float32, device)
    with pytest.raises(ValueError, match=r"cache.key_scales: some given with keys of torch.float3"):
        store_kv(keys, keys, KvCache(plain.keys, plain.values, coded.key_scales), slots(device))
    with pytest.raises(ValueError, match=r"slots is torch\.int32, expected torch\.int64"):
        store_kv(keys, keys, plain, slots(device).int())
