"""Norms against the CPU's ops."""

import pytest
import torch
from torch import Tensor

from shoal.kernels import norm as oracle
from shoal.kernels.gpu.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    norm_heads_,
    quantized_layer_norm,
    quantized_rms_norm,
    rms_norm,
)

EPS = 1e-5
SHAPES = [(1, 8), (3, 576), (2, 1000)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return drawn.to(device, dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(
        found.float().cpu(), wanted.float().cpu(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_is_the_oracles(
    shape: tuple[int, int],
    plus_one: bool,
    device: torch.device,
    float_types: tuple[torch.dtype, ...],
) -> None:
    """Every pair of dtypes, rows of a wider matrix."""
    for source in float_types:
        for target in float_types:
            x = random(shape[0], shape[1] + 5, device=device, dtype=source)[:, : shape[1]]
            weight = random(shape[1], device=device)
            found = rms_norm(x, weight, EPS, target, plus_one=plus_one)
            factor = weight.cpu() + float(plus_one)
            wanted = oracle.rms_norm(x.float().cpu(), factor, torch.tensor(EPS), target)
            assert found.dtype == target
            close(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_takes_the_sum_that_is_normed(
    shape: tuple[int, int], device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """In place, rounded to the residual's dtype, into the buffer that is given."""
    for dtype in float_types:
        residual = random(*shape, device=device, dtype=dtype)
        delta = random(*shape, device=device, dtype=dtype) * 0.5
        weight = random(shape[1], device=device)
        out = torch.full_like(residual, torch.nan)
        summed = residual + delta
        found = add_rms_norm(residual, delta, weight, EPS, dtype, out=out)
        assert found is out
        close(residual, summed)
        wanted = oracle.rms_norm(residual.float().cpu(), weight.cpu(), torch.tensor(EPS), dtype)
        close(found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_is_the_oracles(
    shape: tuple[int, int], affine: bool, device: torch.device
) -> None:
    """With and without weight and bias, alone and behind a sum; rows far from zero are centred
    before they are squared."""
    x = random(*shape, device=device) + 100
    delta = random(*shape, device=device)
    weight = random(shape[1], device=device) if affine else None
    bias = random(shape[1], device=device) * 2 if affine else None
    parts = [None if part is None else part.cpu() for part in (weight, bias)]
    wanted = oracle.layer_norm(x.cpu(), *parts, EPS, torch.float32)
    found = layer_norm(x, weight, bias, EPS, torch.float32)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
    wanted = oracle.layer_norm((x + delta).cpu(), *parts, EPS, torch.float32)
    found = add_layer_norm(x, delta, weight, bias, EPS, torch.float32)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("centered", [False, True])
def test_codes_times_scales_are_the_norm(
    dtype: torch.dtype, centered: bool, device: torch.device
) -> None:
    """Within half a step of the code, and the largest of a row takes the largest code."""
    x, delta = random(3, 100, device=device), random(3, 100, device=device)
    weight = random(100, device=device)
    summed = (x + delta).cpu()
    if centered:
        wanted = oracle.layer_norm(summed, weight.cpu(), None, EPS, torch.float32)
        codes, scales = quantized_layer_norm(x, weight, None, EPS, dtype, delta=delta)
    else:
        wanted = oracle.rms_norm(summed, weight.cpu(), torch.tensor(EPS), torch.float32)
        codes, scales = quantized_rms_norm(x, weight, EPS, dtype, delta=delta)
    assert codes.dtype == dtype and scales.shape == (3,)
    found = codes.cpu().float() * scales.cpu().unsqueeze(1)
    largest = wanted.abs().amax(1, keepdim=True)
    step = largest / 254 if dtype == torch.int8 else (wanted.abs() / 16).clamp_min(largest / 2**16)
    assert ((found - wanted).abs() <= step * 1.001).all()
    limit = 127 if dtype == torch.int8 else 448
    assert codes.cpu().float().abs().amax(1).tolist() == [limit] * 3


def test_codes_of_a_broken_row_say_so(device: torch.device) -> None:
    """A NaN among the states shows in the scale, since no code could; its neighbours are whole."""
    x = random(3, 40, device=device)
    x[1, 7] = torch.nan
    _, scales = quantized_rms_norm(x, torch.ones(40, device=device), EPS, torch.int8)
    assert scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("heads", "size"), [(1, 64), (3, 80), (20, 128)])
def test_heads_are_normed_one_by_one(
    heads: int, size: int, device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """In place in a slice of the projection; what is beside the slice stays."""
    for dtype in float_types:
        joined = random(3, heads + 2, size, device=device, dtype=dtype)
        weight = random(size, device=device)
        wanted = joined.cpu().clone()
        oracle.norm_heads_(wanted[:, 1 : heads + 1], weight.cpu(), torch.tensor(EPS))
        norm_heads_(joined[:, 1 : heads + 1], weight, EPS)
        close(joined, wanted)


def test_all_heads_of_a_token_are_normed_as_one(device: torch.device) -> None:
    """A weight as wide as the row takes the row as a single head."""
    rows, weight = random(3, 96, device=device), random(96, device=device)
    wanted = rows.cpu().clone()
    oracle.norm_heads_(wanted, weight.cpu(), torch.tensor(EPS))
    norm_heads_(rows, weight, EPS)
    close(rows, wanted)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    """Shapes, dtypes and widths beyond the kernel are refused before a launch."""
    x, weight = random(2, 8, device=device), random(8, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \[7\], expected \[8\]"):
        rms_norm(x, weight[:7], EPS, torch.float32)
    with pytest.raises(ValueError, match=r"codes_dtype is torch\.int32"):
        quantized_rms_norm(x, weight, EPS, torch.int32)
    with pytest.raises(ValueError, match="rows of 40000, expected 1 to 32768"):
        rms_norm(torch.zeros(1, 40000), torch.zeros(40000), EPS, torch.float32)
    with pytest.raises(ValueError, match=r"out_dtype is torch\.int8"):
        rms_norm(x, weight, EPS, torch.int8)
