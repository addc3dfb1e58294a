"""Rope against complex multiplication."""

import pytest
import torch
from torch import Tensor

from shoal.kernels import rope as oracle
from shoal.kernels.gpu.rope import apply_rope_, cos_sin_table

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random_heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def turns_of(pairs: int, positions: int) -> Tensor:
    return oracle.rope_table(10_000.0 ** -(torch.arange(pairs) / pairs), positions)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [(1, 64, 64), (5, 80, 32), (9, 96, 96)]
)
@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_turn_as_complex_numbers_do(
    heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    device: torch.device,
    float_types: tuple[torch.dtype, ...],
) -> None:
    """Whole and part, both pairings, positions in any order; heads beside the slice stay."""
    turns = turns_of(rotary_dim // 2, 50)
    positions = torch.tensor([49, 0, 7, 7])
    order = torch.arange(rotary_dim)
    if not interleaved:
        order = order.view(2, -1).t().flatten()
    for dtype in float_types:
        joined = random_heads(4, heads + 3, head_dim, dtype=dtype)
        wanted = joined.clone()
        paired = wanted[:, 1 : heads + 1, order].clone()
        oracle.apply_rope_(paired, turns[positions])
        wanted[:, 1 : heads + 1, order] = paired
        found = joined.to(device)
        apply_rope_(
            found[:, 1 : heads + 1],
            cos_sin_table(turns).to(device),
            positions.to(device),
            interleaved=interleaved,
        )
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)


def test_a_table_that_does_not_fit_is_named(device: torch.device) -> None:
    """Wider than a head, or of an odd width."""
    heads, positions = torch.zeros(2, 1, 8, device=device), torch.zeros(2).long().to(device)
    for width in (10, 7):
        table = torch.zeros(4, width, device=device)
        with pytest.raises(ValueError, match=f"table turns {width} elements"):
            apply_rope_(heads, table, positions, interleaved=True)
