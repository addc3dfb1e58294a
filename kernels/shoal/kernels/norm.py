"""Norms over a float32 residual stream, and over heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, dtype


def rms_norm(residual: Tensor, weight: Tensor, eps: Tensor, out: dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` of each row, computed in float32 and cast to `out`.

    residual [rows, hidden] float32, weight [hidden] float32, eps [] float32 -> [rows, hidden].
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    # torch's own rms_norm makes a pass over all rows for the squares and one for their mean.
    norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
    inverse = torch.addcmul(eps, norm, norm, value=1 / residual.shape[-1]).rsqrt_()
    return torch.mul(residual, inverse).mul_(weight).to(out)


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: Tensor, out: dtype
) -> Tensor:
    """Adds `delta` [rows, hidden] to `residual` in place, then norms the sum (see `rms_norm`)."""
    return rms_norm(residual.add_(delta), weight, eps, out)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: dtype
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` of each row, in float32, cast to `out`.

    x [rows, hidden] float32, weight and bias [hidden] float32 or none -> [rows, hidden].
    Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(out)


def norm_heads_(heads: Tensor, weight: Tensor, eps: Tensor) -> None:
    """Root-mean-square norm over the last dimension, in place.

    heads [tokens, heads, n], any strides with a dense last dimension, or [tokens, n]; weight [n]
    float32.
    """
    values = heads.float()
    inverse = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    heads.copy_(values * inverse * weight)
