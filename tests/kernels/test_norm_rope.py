"""Norm and rotary embedding against their formulas."""

import pytest
import torch

from shoal.kernels.norm import add_rms_norm, rms_norm
from shoal.kernels.rope import apply_rope_, interleave_halves, rope_table


@pytest.mark.parametrize("rows", [1, 33])
def test_rms_norm_is_its_formula(rows: int) -> None:
    """x / sqrt(mean(x^2) + eps) * weight, in float32 and rounded to bfloat16."""
    torch.manual_seed(0)
    x, weight = 100 * torch.randn(rows, 37), torch.randn(37)
    wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, torch.tensor(1e-5), torch.float32), wanted)
    assert torch.equal(
        rms_norm(x, weight, torch.tensor(1e-5), torch.bfloat16), wanted.to(torch.bfloat16)
    )


def test_add_rms_norm_keeps_the_sum() -> None:
    """The residual holds the sum afterwards, in float32, whatever the delta's dtype."""
    residual, delta = torch.full((2, 8), 256.0), torch.full((2, 8), 0.5, dtype=torch.bfloat16)
    out = add_rms_norm(residual, delta, torch.ones(8), torch.tensor(0.0), torch.float32)
    assert (residual == 256.5).all()
    torch.testing.assert_close(out, torch.ones(2, 8))


@pytest.mark.parametrize("rotary", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_rope_gives_the_products_of_the_half_layout(
    rotary: int, dtype: torch.dtype
) -> None:
    """Queries and keys reordered by `interleave_halves` and turned as pairs have the same dot
    products as Hugging Face's rotate-half, also where only a part of the head is rotary."""
    torch.manual_seed(0)
    tokens, heads, dim, hidden = 9, 3, 16, 24
    frequencies = 10_000.0 ** -(torch.arange(0, rotary, 2).double() / rotary)
    turns = rope_table(frequencies, 5000)[torch.arange(tokens) * 511]
    x = torch.randn(tokens, hidden)
    weight = torch.randn(heads * dim, hidden) / hidden**0.5

    plain = (x @ weight.T).view(tokens, heads, dim)
    angles = torch.cat((torch.arange(tokens)[:, None] * 511 * frequencies,) * 2, -1)[:, None]
    first, second = plain[..., : rotary // 2], plain[..., rotary // 2 : rotary]
    turned = plain[..., :rotary] * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    wanted = torch.cat((turned, plain[..., rotary:]), -1).float()

    ours = (x @ interleave_halves(weight, heads, rotary).T).view(tokens, heads, dim).to(dtype)
    apply_rope_(ours, turns)
    products = torch.einsum("ihd,jhd->hij", ours.float(), ours.float())
    expected = torch.einsum("ihd,jhd->hij", wanted, wanted)
    tolerance = 2e-5 if dtype is torch.float32 else 0.3
    torch.testing.assert_close(products, expected, rtol=0, atol=tolerance)


def test_rope_writes_through_a_view() -> None:
    """Only the heads handed in change, in place, in the buffer that holds values too."""
    buffer = torch.randn(4, 5, 8)
    before = buffer.clone()
    apply_rope_(buffer[:, :3], rope_table(torch.tensor([1.0, 0.1, 0.01, 0.001]), 8)[4:])
    assert torch.equal(buffer[:, 3:], before[:, 3:])
    assert (buffer[:, :3] != before[:, :3]).all()


def test_wrong_turns_are_refused() -> None:
    """Turns of another length, or of more dimensions than a head has, are a ValueError."""
    for shape in ((3, 4), (4, 5)):
        with pytest.raises(ValueError, match="do not fit"):
            apply_rope_(torch.zeros(4, 2, 8), torch.zeros(shape, dtype=torch.complex64))
