"""Root-mean-square norm over a float32 residual stream."""

import torch.nn.functional as F
from torch import Tensor, dtype


def rms_norm(residual: Tensor, weight: Tensor, eps: float, out: dtype) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` of each row, computed in float32 and cast to `out`.

    residual [rows, hidden] float32, weight [hidden] float32 -> [rows, hidden].
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    return F.rms_norm(residual, weight.shape, weight, eps).to(out)


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float, out: dtype) -> Tensor:
    """Adds `delta` [rows, hidden] to `residual` in place, then norms the sum (see `rms_norm`)."""
    return rms_norm(residual.add_(delta), weight, eps, out)
