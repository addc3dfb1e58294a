"""Low-rank adapters against a loop over the rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.gpu.lora import LoraBatch, add_lora, add_lora_reference, lora_workspace

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def compare(
    adapters: list[int],
    rank: int,
    hidden: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    tiles: int | None = None,
) -> None:
    """The kernel's sum of a batch equals the loop's, in a slice of a wider output."""
    torch.manual_seed(rank * hidden + columns)
    ids = torch.tensor(adapters, dtype=torch.int64)
    count = max([*adapters, 0]) + 1
    x = torch.randn(len(adapters), hidden, device=device, dtype=dtype)
    down = torch.randn(count, rank, hidden, device=device, dtype=dtype) / hidden**0.5
    up = torch.randn(count, columns, rank, device=device, dtype=dtype) / rank**0.5
    scales = torch.rand(count, device=device) + 0.5
    wide = torch.randn(len(adapters), columns + 9, device=device, dtype=dtype)
    before = wide.clone()
    out = wide[:, 5 : 5 + columns]
    expected = add_lora_reference(out.clone(), x, down, up, scales, ids)
    workspace = lora_workspace(len(adapters), hidden, rank, device).fill_(float("nan"))
    add_lora(out, x, down, up, scales, LoraBatch.of(ids, device, tiles), workspace)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(wide[:, :5], before[:, :5])
    assert torch.equal(wide[:, 5 + columns :], before[:, 5 + columns :])
    assert torch.equal(wide[ids.to(device) < 0], before[ids.to(device) < 0])


@settings(max_examples=10, deadline=None)
@given(
    adapters=st.lists(st.integers(-1, 3), min_size=1, max_size=24),
    rank=st.sampled_from([1, 8, 16, 24, 64]),
    hidden=st.sampled_from([16, 72, 320]),
    columns=st.sampled_from([1, 48, 136]),
    half=st.booleans(),
)
def test_every_row_gets_its_own_adapter(
    device: torch.device, adapters: list[int], rank: int, hidden: int, columns: int, half: bool
) -> None:
    """Any mix of adapters and rows without one, any rank, sizes that fill no tile."""
    compare(adapters, rank, hidden, columns, torch.float16 if half else torch.float32, device)


def test_a_prompt_takes_large_tiles(device: torch.device, float_types: tuple[torch.dtype]) -> None:
    """Seventy rows of one adapter among those of others, in every type."""
    for dtype in float_types:
        compare([2] * 35 + [0, -1, 1] + [2] * 35, 128, 80, 40, dtype, device)


def test_tiles_that_pad_change_nothing(device: torch.device) -> None:
    """A recorded launch has room for more tiles than this step's batch has."""
    compare([1, 0, 1], 8, 64, 32, torch.float32, device, tiles=6)
    with pytest.raises(ValueError, match="needs 2 tiles of adapters, tiles is 1"):
        compare([1, 0, 1], 8, 64, 32, torch.float32, device, tiles=1)


def test_a_batch_without_adapters_is_left_as_it_is(device: torch.device) -> None:
    """Rows of the base model alone launch nothing."""
    compare([-1, -1], 8, 64, 32, torch.float32, device)


@pytest.mark.parametrize("adapters", [[0], [3, 1, 3, -1, 1], [5] * 130 + [2] * 3, [-1] * 4])
def test_tiles_hold_each_row_once_under_its_adapter(adapters: list[int]) -> None:
    """The tiles of a batch say again which row uses which adapter."""
    batch = LoraBatch.of(torch.tensor(adapters), torch.device("cpu"))
    found = [-1] * len(adapters)
    for start, count, adapter in zip(
        batch.starts.tolist(), batch.counts.tolist(), batch.adapters.tolist(), strict=True
    ):
        assert 0 < count <= batch.tile
        for row in batch.rows[start : start + count].tolist():
            assert found[row] == -1
            found[row] = adapter
    assert found == adapters


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """A workspace that is too small and an adapter of another width are refused with figures."""
    x, down, up = (torch.zeros(s, device=device) for s in ((2, 64), (1, 8, 64), (1, 32, 8)))
    out, scales = torch.zeros(2, 32, device=device), torch.ones(1, device=device)
    batch = LoraBatch.of(torch.tensor([0, 0]), device)
    with pytest.raises(ValueError, match="workspace holds 1 numbers, 32 are needed"):
        add_lora(out, x, down, up, scales, batch, torch.zeros(1, device=device))
    with pytest.raises(ValueError, match=r"down has shape \[1, 8, 32\], expected \[any, any, 64\]"):
        add_lora(out, x, down[:, :, :32].contiguous(), up, scales, batch)
