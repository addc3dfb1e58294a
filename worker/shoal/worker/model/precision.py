"""The number formats a model runs in."""

from dataclasses import dataclass

import torch

from shoal.kernels.linear import bfloat16_is_fast


@dataclass(frozen=True, slots=True)
class Precision:
    """`weights` are rounded to one dtype, matrices multiplied in another. The residual stream,
    norms and rotations are in float32 always."""

    name: str  # as in EngineConfig.dtype
    weights: torch.dtype
    compute: torch.dtype
    cache: torch.dtype


_KNOWN = {
    "float32": Precision("float32", torch.float32, torch.float32, torch.float32),
    "bfloat16": Precision("bfloat16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    # No CPU in reach multiplies float16 fast: torch is ten times slower in it than in float32.
    "float16": Precision("float16", torch.float16, torch.float32, torch.float16),
}


def choose_precision(dtype: str) -> Precision:
    """The precision for a `dtype` setting; `auto` is bfloat16 where the CPU has it in hardware,
    else float32. Raises ValueError that lists what is known."""
    if dtype == "auto":
        dtype = "bfloat16" if bfloat16_is_fast() else "float32"
    if dtype not in _KNOWN:
        raise ValueError(f"dtype is {dtype!r}, expected auto, " + ", ".join(sorted(_KNOWN)))
    return _KNOWN[dtype]
