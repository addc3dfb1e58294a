"""Activations and the embedding against torch."""

import pytest
import torch
from torch import Tensor

from shoal.kernels.activation import ACTIVATIONS
from shoal.kernels.gpu.activation import activated, gated, quantized_gated
from shoal.kernels.gpu.embedding import embed

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("columns", [1, 70, 1100])
def test_gated_is_the_activation_times_the_other_half(
    name: str, columns: int, device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """Odd widths, rows of a wider matrix, and the activation alone, in place."""
    for dtype in float_types:
        wide = random(3, 2 * columns + 1, dtype)
        x = wide[:, : 2 * columns]
        gate, up = x.float().chunk(2, dim=1)
        found = gated(wide.to(device)[:, : 2 * columns], name)
        assert found.dtype == dtype
        tolerance = TOLERANCE[dtype]
        wanted = (ACTIVATIONS[name](gate) * up).to(dtype)
        torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)
        wanted = ACTIVATIONS[name](x.float()).to(dtype)
        alone = x.to(device)
        assert activated(alone, name, out=alone) is alone
        torch.testing.assert_close(alone.cpu(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("columns", [100, 5000])
def test_gated_codes_are_within_half_a_step(
    dtype: torch.dtype, columns: int, device: torch.device
) -> None:
    """Rows wider than what a program holds are coded with one scale; a NaN shows in it."""
    x = random(3, 2 * columns)
    x[2, columns - 1] = torch.nan
    codes, scales = quantized_gated(x.to(device), "silu", dtype)
    assert scales.isnan().tolist() == [False, False, True]
    gate, up = x[:2].chunk(2, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    found = codes.cpu()[:2].float() * scales.cpu()[:2].unsqueeze(1)
    largest = wanted.abs().amax(1, keepdim=True)
    step = largest / 254 if dtype == torch.int8 else (wanted.abs() / 16).clamp_min(largest / 2**16)
    assert ((found - wanted).abs() <= step * 1.001).all()


def test_an_activation_that_is_not_known_is_named(device: torch.device) -> None:
    """The sentence lists those that are."""
    with pytest.raises(ValueError, match="activation is 'swish', expected one of gelu, gelu_tanh"):
        gated(torch.zeros(1, 2, device=device), "swish")
    with pytest.raises(ValueError, match="gate_up has 3 columns"):
        gated(torch.zeros(1, 3, device=device), "silu")


@pytest.mark.parametrize("hidden", [8, 576, 1500])
def test_embed_gathers_and_scales(
    hidden: int, device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """Ids outside the table, as another rank's or a padding's are, give zeros."""
    ids = torch.tensor([3, 0, -1, 6, 7])
    for source in float_types:
        for target in float_types:
            table = random(7, hidden, source)
            wanted = torch.zeros(5, hidden)
            wanted[[0, 1, 3]] = table[[3, 0, 6]].float() * 1.7
            found = embed(ids.to(device), table.to(device), target, 1.7)
            torch.testing.assert_close(found.cpu(), wanted.to(target), rtol=1e-3, atol=1e-3)
