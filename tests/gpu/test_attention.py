"""Paged attention on the device against sums in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.attention import paged_attention as cpu_attention
from shoal.kernels.gpu.attention import attention_workspace, paged_attention
from shoal.kernels.gpu.attention_plan import Load, Plan, Tile, plan_attention
from shoal.kernels.gpu.attention_reference import paged_attention_reference
from shoal.kernels.gpu.attention_tuning import configured
from shoal.kernels.paged import CacheShape, plan_batch
from tests.gpu.attention_batches import SMALL, TOLERANCE, Case, batch_of, cache_of

SCALE = 0.3
FEW_ONLY = replace(SMALL, many=None)
# A decoding row among chunks, a cached prefix, a padding row, a chunk that starts a sequence.
MIXED = Case(lengths=(37, 70, 0, 5, 61), counts=(1, 22, 1, 5, 3))


def check(
    case: Case,
    device: torch.device,
    plan: Plan | None = SMALL,
    window: int | None = None,
    softcap: float | None = None,
    tolerance: float | None = None,
) -> None:
    batch, blocks = batch_of(case, device)
    cache = cache_of(case, batch, blocks, device)
    queries = case.queries(device)
    got = paged_attention(queries, cache, batch, SCALE, window, softcap, plan=plan)
    expected = paged_attention_reference(queries, cache, batch, SCALE, window, softcap)
    limit = TOLERANCE[case.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(got.double(), expected, atol=limit, rtol=limit)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 100), min_size=1, max_size=4))
    counts = [draw(st.integers(1, min(max(length, 1), 20))) for length in lengths]
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4), (1, 7)]))
    return Case(
        lengths=tuple(lengths),
        counts=tuple(counts),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 24])),
        block_size=draw(st.sampled_from([16, 32])),
        seed=draw(st.integers(0, 1000)),
    )


def tiled(case: Case, queries: int, splits: int) -> Plan:
    """Tiles for the case's heads, of at most 16 rows; a group of 7 takes two tiles of heads."""
    heads = min(case.heads // case.kv_heads, 4)
    many = Tile(min(queries, 16 // heads), heads, 16, 16)
    return Plan(replace(many, keys=32), many, splits, least_keys=16)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=cases(),
    window=st.one_of(st.none(), st.integers(1, 60)),
    queries=st.integers(1, 4),
    splits=st.integers(1, 4),
)
def test_any_mix_of_sequences_equals_the_reference(
    device: torch.device, case: Case, window: int | None, queries: int, splits: int
) -> None:
    """Lengths, chunks, shuffled tables, groups, windows and splits as they come."""
    check(case, device, tiled(case, queries, splits), window)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_softcaps_hold_in_mixed_batches(
    device: torch.device, window: int | None, softcap: float | None
) -> None:
    """Each alone and both together, in split and in tiled sequences."""
    check(MIXED, device, window=window, softcap=softcap)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 20])
def test_every_dtype_of_queries_and_cache_is_read(
    device: torch.device,
    float_types: tuple[torch.dtype, ...],
    cache_dtype: torch.dtype | None,
    window: int | None,
) -> None:
    """Quantized keys and values count as their codes times their scales."""
    for dtype in float_types:
        check(replace(MIXED, dtype=dtype, cache_dtype=cache_dtype), device, window=window)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_every_size_of_head_is_attended(device: torch.device, head_dim: int) -> None:
    """Sizes that are no power of two are padded without reading beyond a head."""
    check(Case((20, 33), (1, 6), head_dim=head_dim), device, tolerance=1e-4)


@pytest.mark.parametrize("block_size", [8, 16, 48, 128])
def test_every_size_of_block_is_walked(device: torch.device, block_size: int) -> None:
    """Blocks narrower and wider than a tile of keys, and no power of two."""
    check(Case((150, 40), (1, 9), block_size=block_size), device)


def test_the_default_plan_serves_a_decode_batch(device: torch.device) -> None:
    """No plan given: few sequences with long contexts are split and merged."""
    check(Case((700, 300, 0), (1, 1, 1), heads=8, kv_heads=1), device, None)


def test_the_default_plan_serves_a_mixed_batch(device: torch.device) -> None:
    """No plan given: one decoding sequence beside a chunk longer than a tile of few rows."""
    check(Case((300, 70), (1, 66), heads=2, kv_heads=1), device, None)


def test_a_tuned_tile_gives_the_same(device: torch.device) -> None:
    """What a table changes is how, not what: the rows that it asks for are filled with queries."""
    assert SMALL.few is not None and SMALL.many is not None
    sizes = {"KEYS": 32, "num_warps": 8, "num_stages": 4}
    few = configured(SMALL.few, sizes)
    many = configured(SMALL.many, {"ROWS": 32, **sizes})
    assert (few.queries, few.rows, few.keys, few.warps, few.stages) == (4, 16, 32, 8, 4)
    assert (many.queries, many.heads, many.rows) == (8, 4, 32)
    check(MIXED, device, Plan(few, many, 2, least_keys=32))


def test_a_row_that_sees_nothing_gives_zeros(device: torch.device) -> None:
    """Padding of a graph's batch reads no block and yields no NaN."""
    case = Case((0, 0, 9), (1, 3, 1))
    batch, blocks = batch_of(case, device)
    cache = cache_of(case, batch, blocks, device)
    for plan in (SMALL, FEW_ONLY, replace(FEW_ONLY, splits=1), replace(SMALL, few=None)):
        got = paged_attention(case.queries(device), cache, batch, SCALE, plan=plan)
        assert (got[:4] == 0).all() and got[4].isfinite().all()


def test_a_slice_of_a_wider_row_is_read_and_out_and_workspace_are_used(
    device: torch.device,
) -> None:
    """Queries may lie in the joined projection; a given output and workspace spare allocation."""
    case = Case((40, 90), (1, 1))
    batch, blocks = batch_of(case, device)
    cache = cache_of(case, batch, blocks, device)
    joined = case.draw(2, 8, case.head_dim, device=device)
    queries = joined[:, 2:6]
    out = torch.full((2, 4, case.head_dim), float("nan"), device=device)
    workspace = torch.full((FEW_ONLY.workspace(2, 4, case.head_dim),), float("nan"), device=device)
    got = paged_attention(queries, cache, batch, SCALE, out=out, workspace=workspace, plan=FEW_ONLY)
    assert got.data_ptr() == out.data_ptr() and not workspace.isnan().all()
    expected = paged_attention_reference(queries, cache, batch, SCALE)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


def test_the_cpu_op_agrees(device: torch.device) -> None:
    """The same mixed batch through the engine's CPU kernel."""
    case = Case(lengths=(37, 70, 5), counts=(1, 22, 5))
    batch, blocks = batch_of(case, device)
    cache = cache_of(case, batch, blocks, device)
    queries = case.queries(device)
    shape = CacheShape(blocks, case.block_size, case.kv_heads, case.head_dim)
    counts = np.array(case.counts)
    tables = batch.tables.cpu().numpy().astype(np.int64)
    planned = plan_batch(np.array(case.lengths) - counts, counts, tables, shape, torch.float32)
    joined = torch.cat([cache.keys, cache.values], 1).cpu().nan_to_num()
    flat: Tensor = joined.transpose(0, 1).reshape(-1, case.block_size * case.head_dim)
    expected = cpu_attention(queries.cpu(), flat, planned, shape, SCALE)
    got = paged_attention(queries, cache, batch, SCALE, plan=SMALL).cpu()
    torch.testing.assert_close(got.flatten(1), expected, atol=2e-5, rtol=2e-5)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """Queries of another dtype, heads that do not divide, a workspace too small, a bad scale."""
    case = Case((40, 90), (1, 1))
    batch, blocks = batch_of(case, device)
    cache = cache_of(case, batch, blocks, device)
    queries = case.queries(device)
    with pytest.raises(ValueError, match=r"queries are torch.float16 and the cache torch.float32"):
        paged_attention(queries.half(), cache, batch, SCALE)
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 key heads"):
        paged_attention(queries[:, :3], cache, batch, SCALE)
    with pytest.raises(ValueError, match="scale is 0"):
        paged_attention(queries, cache, batch, 0)
    with pytest.raises(ValueError, match="workspace has 1 elements"):
        workspace = torch.zeros(1, device=device)
        paged_attention(queries, cache, batch, SCALE, workspace=workspace, plan=FEW_ONLY)
    half = replace(batch, lengths=batch.lengths.long())
    with pytest.raises(ValueError, match=r"batch\.lengths is torch.int64"):
        paged_attention(queries, cache, half, SCALE)


def test_the_workspace_of_a_plan_is_what_the_call_takes(device: torch.device) -> None:
    """A graph's workspace, asked for by the bounds at capture, is enough."""
    case = Case((700, 300), (1, 1), heads=8, kv_heads=1)
    batch, blocks = batch_of(case, device)
    cache = cache_of(case, batch, blocks, device)
    needed = attention_workspace(case.queries(device), cache, batch)
    assert needed > 0
    workspace = torch.zeros(needed, device=device)
    paged_attention(case.queries(device), cache, batch, SCALE, workspace=workspace)


@pytest.mark.parametrize(
    ("load", "few", "many"),
    [
        (Load(32, 8, 1, 1, 131072), True, False),
        (Load(32, 8, 256, 1, 2048), True, False),
        (Load(32, 8, 1, 2048, 2048), False, True),
        (Load(32, 8, 9, 2048, 16384), True, True),
        (Load(28, 4, 4, 5, 4096), True, False),
        (Load(71, 1, 4, 300, 4096), True, True),
        (Load(200, 1, 4, 1, 4096), True, False),
    ],
)
def test_plans_cover_every_sequence_and_fit_their_tiles(load: Load, few: bool, many: bool) -> None:
    """The launches that a load needs, and rows that hold a group's heads."""
    plan = plan_attention(load, 128, bits=16, cache_bits=16, units=132)
    assert (plan.few is not None, plan.many is not None) == (few, many)
    assert many or (plan.few is not None and plan.few.queries >= load.max_queries)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 71])
def test_short_prompts_need_few_compilations(group: int) -> None:
    """However many queries a step brings, tiles have one of a few numbers of them."""
    plans = [
        plan_attention(
            Load(group, 1, sequences, queries, 4096), 128, bits=16, cache_bits=16, units=132
        )
        for sequences in (1, 2)
        for queries in range(1, 300)
    ]
    assert len({plan.few for plan in plans}) <= 8
    assert len({plan.many for plan in plans}) <= 2


def test_splits_fill_the_device_and_stop_where_there_is_little_to_read() -> None:
    """One long sequence is cut finely, many or short or windowed ones are not."""

    def splits(sequences: int, length: int, window: int | None = None) -> int:
        load = Load(32, 8, sequences, 1, length, window)
        return plan_attention(load, 128, bits=16, cache_bits=16, units=132).splits

    assert splits(1, 131072) == 66
    assert splits(1, 256) == 1
    assert splits(256, 131072) == 1
    assert splits(1, 131072, window=512) <= 3
