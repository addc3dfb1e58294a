"""Where weights come from: tensors by Hugging Face's names, whatever the file format."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class WeightError(ValueError):
    """A checkpoint cannot be used. The message names file or tensor, what was expected, and
    what was found."""


class WeightSource(Protocol):
    """The tensors of one checkpoint. Reading one is what touches its bytes."""

    @property
    def origin(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, by its Hugging Face name."""
        ...

    @property
    def interleaved_rope(self) -> bool:
        """Whether query and key rows pair elements 2i and 2i + 1, not i and i + rotary_dim / 2."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor as stored: float32, float16 or bfloat16. Raises WeightError if the bytes
        cannot be read or are of another type."""
        ...
