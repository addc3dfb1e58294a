"""Rotary position embedding over interleaved pairs.

Elements 2i and 2i + 1 of a head form a complex number that is turned by the angle
`position * inverse_frequency[i]` (Su et al., "RoFormer", 2021). Hugging Face checkpoints pair
element i with element i + rotary_dim / 2 instead: `interleave_halves` reorders the rows of their
query and key projections once, which leaves every query-key product as it was.
"""

import torch
from torch import Tensor


def rope_table(inverse_frequencies: Tensor, positions: int) -> Tensor:
    """Unit complex numbers [positions, rotary_dim / 2] from float frequencies [rotary_dim / 2].

    Angles are computed in float64: at position 100,000 float32 would be off by 0.004 rad.
    """
    steps = torch.arange(positions, dtype=torch.float64)
    angles = torch.outer(steps, inverse_frequencies.to(torch.float64))
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def apply_rope_(x: Tensor, turns: Tensor) -> None:
    """Rotates the first rotary_dim elements of every head, in place.

    x [tokens, heads, head_dim], any strides with a dense last dimension;
    turns [tokens, rotary_dim / 2], rows of a `rope_table`.
    """
    tokens, heads, head_dim = x.shape
    rotary_dim = 2 * turns.shape[1]
    if turns.shape[0] != tokens or rotary_dim > head_dim:
        raise ValueError(f"turns {list(turns.shape)} do not fit x {list(x.shape)}")
    rotated = x if rotary_dim == head_dim else x[..., :rotary_dim]
    pairs = rotated.float().view(tokens, heads, rotary_dim // 2, 2)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turns.unsqueeze(1))
    rotated.copy_(turned.view(tokens, heads, rotary_dim))


def interleave_halves(weight: Tensor, heads: int, rotary_dim: int) -> Tensor:
    """Reorders the rows of a projection whose heads pair element i with i + rotary_dim / 2.

    weight [heads * head_dim, ...] (a matrix, or a bias) -> the same shape, a new tensor.
    """
    per_head = weight.view(heads, -1, *weight.shape[1:])
    half = rotary_dim // 2
    order = torch.arange(per_head.shape[1])
    order[:rotary_dim] = torch.arange(rotary_dim).view(2, half).t().reshape(-1)
    return per_head[:, order].reshape(weight.shape)
