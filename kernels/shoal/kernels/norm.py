"""Root-mean-square norm over a float32 residual stream."""

import torch
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
