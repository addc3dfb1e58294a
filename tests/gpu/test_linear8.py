"""Eight-bit linears: codes of rows, and products of codes, against plain torch."""

import pytest
import torch

from shoal.kernels.gpu.linear8 import Linear8, linear8, linear8_reference, workspace8
from shoal.kernels.gpu.pack8 import quantize8
from shoal.kernels.gpu.quantize import (
    quantize_groups,
    quantize_reference,
    quantize_rows,
)

CODES = (torch.int8, torch.float8_e4m3fn)
SHAPES = ((1, 48, 96), (3, 129, 144), (17, 40, 272), (70, 136, 130))


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def coded(x: torch.Tensor, dtype: torch.dtype, blocked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_groups(x, dtype) if blocked else quantize_rows(x, dtype)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("columns", [1, 100, 128, 300])
def test_codes_of_rows_are_those_of_the_reference(
    dtype: torch.dtype, columns: int, device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """Per row and per group of 128, from every float dtype, a row of zeros and large ones too."""
    for float_type in float_types:
        x = random(5, columns, device=device, dtype=float_type)
        x[1] = 0
        x[2] *= 1000
        for group, quantize in ((columns, quantize_rows), (128, quantize_groups)):
            codes, scales = quantize(x, dtype)
            expected, expected_scales = quantize_reference(x, dtype, group)
            torch.testing.assert_close(scales.view(5, -1), expected_scales)
            # Division may round otherwise and move a value over the middle between two codes.
            apart = (codes.float() - expected.float()).abs()
            step = 1.0 if dtype == torch.int8 else expected.float().abs().clamp_min(0.1) / 7
            assert (apart <= step).all()
            assert (apart > 0).float().mean() < 0.02


def test_a_row_wider_than_a_program_is_coded_in_two_passes(device: torch.device) -> None:
    """The widest MLPs have more columns than a program holds."""
    x = random(1, 20000, device=device)
    codes, scales = quantize_rows(x, torch.int8)
    expected, expected_scales = quantize_reference(x, torch.int8, 20000)
    torch.testing.assert_close(scales.view(1, 1), expected_scales)
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_not_finite_stays_so(
    dtype: torch.dtype, blocked: bool, value: float, device: torch.device
) -> None:
    """Codes have no NaN and no infinity, so the scale tells of them, and of nobody else's."""
    x = random(3, 256, device=device)
    x[1, 3] = value
    weight = quantize8(random(48, 256, device=device), dtype, blocked=blocked)
    out = linear8(*coded(x, dtype, blocked), weight, out_dtype=torch.float32)
    assert out[[0, 2]].isfinite().all()
    assert not out[1].isfinite().any()


@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("rows,outputs,inputs", SHAPES)
def test_products_of_codes_are_those_of_their_values(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, blocked: bool, device: torch.device
) -> None:
    """Odd rows, outputs and inputs, with a bias; sums are exact or in float32."""
    weight = quantize8(random(outputs, inputs, device=device), dtype, blocked=blocked)
    bias = random(outputs, device=device)
    codes, scales = coded(random(rows, inputs, device=device), dtype, blocked)
    y = linear8(codes, scales, weight, bias, torch.float32)
    expected = linear8_reference(codes, scales, weight, bias)
    # Hopper's float8 products are summed with 14 bits of mantissa for 128 columns.
    loose = dtype != torch.int8 and device.type == "cuda"
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=5e-2 if loose else 1e-4)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_inputs_cut_into_parts_give_the_same_sums(dtype: torch.dtype, device: torch.device) -> None:
    """A narrow layer with long inputs is cut; the workspace has exactly the room that it needs."""
    weight = quantize8(random(20, 2100, device=device), dtype)
    codes, scales = quantize_rows(random(2, 2100, device=device), dtype)
    room = workspace8(2, weight)
    assert room > 0
    workspace = torch.full((room,), torch.nan, device=device)
    bias = random(20, device=device)
    out = torch.empty(2, 20, device=device)
    y = linear8(codes, scales, weight, bias, torch.float32, out=out, workspace=workspace)
    assert y is out
    expected = linear8_reference(codes, scales, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-1)
    with pytest.raises(ValueError, match="workspace has"):
        linear8(codes, scales, weight, bias, torch.float32, workspace=workspace[1:])


def test_a_layer_is_close_to_the_one_that_it_was_made_of(
    device: torch.device, float_types: tuple[torch.dtype, ...]
) -> None:
    """Coding rows and weights costs about one part in a hundred of the output's size."""
    exact = random(64, 256, device=device)
    for float_type in float_types:
        x = random(4, 256, device=device, dtype=float_type)
        expected = x.float() @ exact.t()
        for dtype in CODES:
            for blocked in (False, True):
                y = Linear8(quantize8(exact, dtype, blocked=blocked))(x)
                assert y.dtype == float_type
                assert (y.float() - expected).std() < 0.05 * expected.std()


def test_no_rows_are_no_work(device: torch.device) -> None:
    """An empty batch returns an empty result."""
    layer = Linear8(quantize8(random(32, 64, device=device), torch.int8))
    assert layer(torch.empty(0, 64, device=device)).shape == (0, 32)


def test_tensors_that_do_not_fit_are_named(device: torch.device) -> None:
    """The message says which tensor, what it is and what was expected."""
    weight = quantize8(random(32, 64, device=device), torch.int8)
    codes, scales = quantize_rows(random(2, 64, device=device), torch.int8)
    with pytest.raises(ValueError, match=r"x is torch\.float32, expected torch\.int8"):
        linear8(codes.float(), scales, weight)
    with pytest.raises(ValueError, match=r"x_scales has shape \[1\], expected \[2\]"):
        linear8(codes, scales[:1], weight)
    with pytest.raises(ValueError, match=r"dtype is torch\.int16"):
        quantize_rows(random(2, 64, device=device), torch.int16)
    with pytest.raises(ValueError, match=r"codes torch\.int16"):
        quantize8(random(32, 64, device=device), torch.int16)
