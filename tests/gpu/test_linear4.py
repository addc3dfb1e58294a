"""Four-bit linears: every packing that checkpoints have, against the formats' own arithmetic."""

import pytest
import torch

from shoal.kernels.gpu.linear4 import Linear4, linear4, linear4_reference, workspace4
from shoal.kernels.gpu.pack4 import (
    Weight4,
    from_awq,
    from_compressed,
    from_gptq,
    pack4,
    quantize4,
    stack4,
)

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # that the nibbles of a word hold, lowest first


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Codes packed into int32 words along a dimension, lowest first."""
    split = codes.to(torch.int64).unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    words = (split << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def weight4(
    outputs: int, inputs: int, group: int, *, zeros: bool, order: bool, dtype: torch.dtype
) -> Weight4:
    generator = draw(outputs + inputs)
    groups = inputs // group
    return pack4(
        torch.randint(0, 16, (outputs, inputs), generator=generator),
        (torch.rand(groups, outputs, generator=generator) / 8).to(dtype),
        torch.randint(0, 16, (groups, outputs), generator=generator) if zeros else None,
        torch.randperm(inputs, generator=generator) if order else None,
    )


def on(weight: Weight4, device: torch.device) -> Weight4:
    return Weight4(
        weight.codes.to(device),
        weight.scales.to(device),
        None if weight.zeros is None else weight.zeros.to(device),
        None if weight.order is None else weight.order.to(device),
        weight.inputs,
        weight.group,
    )


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("second_version", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_layers_mean_what_the_format_says(
    group: int, second_version: bool, act_order: bool
) -> None:
    """Codes minus zeros (stored one less in the first version) times the scale of the input's
    group, wherever g_idx puts it; a group of all inputs too."""
    generator = draw(group)
    inputs, outputs = 256, 24
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
    scales = torch.rand(inputs // group, outputs, generator=generator)
    g_idx = torch.arange(inputs) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    stored = zeros if second_version else (zeros - 1) & 15
    weight = from_gptq(
        packed(codes, 0), packed(stored, 1), scales, g_idx.int(), second_version=second_version
    )
    assert (weight.order is not None) == (act_order and group < inputs)
    expected = ((codes - zeros[g_idx]) * scales[g_idx]).t()
    torch.testing.assert_close(weight.dequantized(), expected)


def test_awq_layers_mean_what_the_format_says() -> None:
    """Columns of a word are interleaved, of codes and of zeros."""
    generator = draw(7)
    inputs, outputs, group = 128, 32, 64
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
    scales = torch.rand(inputs // group, outputs, generator=generator)

    def interleaved(columns: torch.Tensor) -> torch.Tensor:
        return packed(columns.unflatten(1, (-1, 8))[:, :, list(AWQ_COLUMNS)].flatten(1), 1)

    weight = from_awq(interleaved(codes), interleaved(zeros), scales)
    row = torch.arange(inputs) // group
    torch.testing.assert_close(weight.dequantized(), ((codes - zeros[row]) * scales[row]).t())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_compressed_layers_mean_what_the_format_says(asymmetric: bool, act_order: bool) -> None:
    """Codes with eight added, zeros packed along the outputs, g_idx of -1 where there is none."""
    generator = draw(11)
    inputs, outputs, group = 160, 16, 32
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator)
    zeros = torch.randint(-8, 8, (outputs, inputs // group), generator=generator)
    scales = torch.rand(outputs, inputs // group, generator=generator)
    column = torch.arange(inputs) // group
    if act_order:
        column = column[torch.randperm(inputs, generator=generator)]
    weight = from_compressed(
        packed(codes + 8, 1),
        scales,
        inputs,
        packed(zeros + 8, 0) if asymmetric else None,
        column.int() if act_order else torch.full((inputs,), -1),
    )
    shifted = codes - zeros[:, column] if asymmetric else codes
    torch.testing.assert_close(weight.dequantized(), shifted * scales[:, column])


def test_groups_of_several_sizes_are_refused() -> None:
    """As a checkpoint's act-order leaves where its inputs were cut in two."""
    codes, zeros = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    g_idx = torch.tensor([0] * 31 + [1] * 33)
    with pytest.raises(ValueError, match="does not put 32 of 64 inputs in each of 2 groups"):
        from_gptq(codes, zeros, torch.ones(2, 8), g_idx)
    with pytest.raises(ValueError, match="group is 16 for 64 inputs"):
        pack4(torch.zeros(8, 64), torch.ones(4, 8), None, None)


CASES = (
    # rows, outputs, inputs, group, zeros, order
    (1, 40, 256, 128, False, False),
    (5, 65, 384, 128, True, True),
    (3, 24, 320, 64, True, False),
    (17, 24, 96, 32, False, True),
    (2, 33, 160, 32, True, True),
    (2, 24, 200, 200, True, True),
    (40, 72, 192, 64, True, True),
    (70, 24, 128, 128, False, False),
)


@pytest.mark.parametrize("rows,outputs,inputs,group,zeros,order", CASES)
def test_products_are_those_of_the_dequantized_weights(
    rows: int,
    outputs: int,
    inputs: int,
    group: int,
    zeros: bool,
    order: bool,
    device: torch.device,
    float_types: tuple[torch.dtype, ...],
) -> None:
    """Odd sizes, inputs that do not fill the last chunk, every kind of group."""
    for dtype in float_types:
        weight = on(weight4(outputs, inputs, group, zeros=zeros, order=order, dtype=dtype), device)
        x = torch.randn(rows, inputs, generator=draw(rows)).to(device, dtype)
        bias = torch.randn(outputs, generator=draw(1)).to(device, dtype)
        y = linear4(x, weight, bias)
        expected = linear4_reference(x, weight, bias)
        step = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        torch.testing.assert_close(y.float(), expected, rtol=step, atol=step * 10)


def test_inputs_cut_into_parts_give_the_same_sums(device: torch.device) -> None:
    """The workspace has exactly the room that it needs, and is written before it is read."""
    weight = on(weight4(24, 2048, 128, zeros=True, order=True, dtype=torch.float32), device)
    x = torch.randn(3, 2048, generator=draw(3)).to(device)
    room = workspace4(3, weight)
    assert room > 0
    workspace = torch.full((room,), torch.nan, device=device)
    out = torch.empty(3, 24, device=device)
    bias = torch.randn(24, generator=draw(4)).to(device)
    assert linear4(x, weight, bias, out=out, workspace=workspace) is out
    torch.testing.assert_close(out, linear4_reference(x, weight, bias), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="workspace has"):
        linear4(x, weight, bias, workspace=workspace[1:])


def test_a_layer_is_close_to_the_one_that_it_was_made_of(device: torch.device) -> None:
    """Sixteen levels a group of 32 cost about a tenth of the output's size."""
    exact = torch.randn(48, 256, generator=draw(5)).to(device)
    x = torch.randn(4, 256, generator=draw(6)).to(device)
    y = Linear4(quantize4(exact, 32))(x)
    assert (y - x @ exact.t()).std() < 0.15 * (x @ exact.t()).std()


def test_no_rows_are_no_work(device: torch.device) -> None:
    """An empty batch returns an empty result."""
    layer = Linear4(quantize4(torch.ones(32, 64, device=device), 64))
    assert layer(torch.empty(0, 64, device=device)).shape == (0, 32)


def test_experts_with_an_order_are_refused(device: torch.device) -> None:
    """Each expert would gather its own columns."""
    weight = weight4(8, 64, 32, zeros=False, order=True, dtype=torch.float32)
    with pytest.raises(ValueError, match="act-order"):
        stack4([weight, weight])
