"""What every wrapper asks of its tensors before it launches a kernel on their addresses."""

import torch
from torch import Tensor


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    *,
    dense: int = 1,
) -> None:
    """Raises ValueError, which names `name`, what is expected and what was given.

    shape: None stands for any size; dtypes: those allowed; dense: how many of the last
    dimensions lie in memory without gaps, so that a kernel may step over them by their sizes.
    """
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, allowed))}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
    step = 1
    for size, stride in list(zip(tensor.shape, tensor.stride(), strict=True))[::-1][:dense]:
        if size > 1 and stride != step:
            raise ValueError(
                f"{name} has strides {list(tensor.stride())}, expected its last {dense} "
                f"dimensions to lie dense"
            )
        step *= size


def expect_together(**tensors: Tensor) -> None:
    """Raises ValueError unless all lie on the device of the first."""
    (first, home), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != home.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {home.device}")
