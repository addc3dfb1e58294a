"""Attention over paged latents against sums in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.gpu.attention import AttentionBatch
from shoal.kernels.gpu.attention_plan import Load, Plan, Tile, plan_latent
from shoal.kernels.gpu.attention_reference import latent_attention_reference
from shoal.kernels.gpu.kv_cache import store_latent
from shoal.kernels.gpu.latent_attention import latent_attention, latent_workspace
from tests.gpu.attention_batches import SMALL, TOLERANCE, Case, batch_of, slots_of

SCALE, RANK, ROPE = 0.2, 32, 8
MIXED = Case(lengths=(37, 70, 0, 5, 61), counts=(1, 22, 1, 5, 3), head_dim=RANK + ROPE)


def prepared(case: Case, device: torch.device) -> tuple[Tensor, Tensor, AttentionBatch]:
    """Queries, a cache of NaN but for the sequences' latents, and the batch."""
    batch, blocks = batch_of(case, device)
    shape = (blocks, case.block_size, case.head_dim)
    cache = torch.full(shape, float("nan"), dtype=case.dtype, device=device)
    slots = slots_of(batch, case.block_size)
    latents = replace(case, seed=case.seed + 1).draw(len(slots), case.head_dim, device=device)
    store_latent(latents, cache, slots)
    return case.queries(device), cache, batch


def check(case: Case, device: torch.device, plan: Plan | None, rank: int = RANK) -> None:
    queries, cache, batch = prepared(case, device)
    got = latent_attention(queries, cache, batch, SCALE, rank, plan=plan)
    expected = latent_attention_reference(queries, cache, batch, SCALE, rank)
    limit = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.double(), expected, atol=limit, rtol=limit)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    heads=st.sampled_from([1, 3, 4, 6]),
    splits=st.integers(1, 4),
    data=st.data(),
)
def test_any_mix_of_sequences_equals_the_reference(
    device: torch.device, lengths: list[int], heads: int, splits: int, data: st.DataObject
) -> None:
    """Prefill chunks, cached prefixes, padding rows and decoding, split or not."""
    counts = tuple(data.draw(st.integers(1, min(max(length, 1), 12))) for length in lengths)
    case = replace(MIXED, lengths=tuple(lengths), counts=counts, heads=heads)
    check(case, device, replace(SMALL, splits=splits))


def test_every_dtype_is_read(device: torch.device, float_types: tuple[torch.dtype, ...]) -> None:
    """Tolerances are those of the dtype."""
    for dtype in float_types:
        check(replace(MIXED, dtype=dtype), device, SMALL)


def test_the_default_plan_serves_long_decoding(device: torch.device) -> None:
    """Splits by the bounds alone, a rank that is no power of two, and a given workspace."""
    case = Case((600, 90), (1, 1), heads=8, head_dim=56)
    check(case, device, None, rank=48)
    queries, cache, batch = prepared(case, device)
    needed = latent_workspace(queries, batch, 48)
    workspace = torch.full((needed,), float("nan"), device=device)
    out = torch.empty(2, 8, 48, device=device)
    latent_attention(queries, cache, batch, SCALE, 48, out, workspace)
    expected = latent_attention_reference(queries, cache, batch, SCALE, 48)
    assert needed and not workspace.isnan().all()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """A rank beyond the row, a cache of another dtype."""
    queries, cache, batch = prepared(MIXED, device)
    with pytest.raises(ValueError, match="kv_rank is 40, expected from 1 to below the rows' 40"):
        latent_attention(queries, cache, batch, SCALE, 40)
    with pytest.raises(ValueError, match=r"cache is torch.float16, expected torch.float32"):
        latent_attention(queries, cache.half(), batch, SCALE, RANK)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("max_queries", [1, 4, 300])
def test_plans_cover_every_sequence(heads: int, max_queries: int) -> None:
    """Tiles of at most 32 rows; long chunks get a launch of their own."""
    plan = plan_latent(Load(heads, 1, 4, max_queries, 4096), bits=16, units=132)
    assert plan.few is not None and plan.few.rows <= 32
    assert plan.many is not None or plan.few.queries >= max_queries


def test_a_tile_refuses_more_rows_than_it_has() -> None:
    """A plan that would drop queries cannot be made."""
    with pytest.raises(AssertionError, match="rows do not hold"):
        Tile(queries=8, heads=4, rows=16, keys=16)
