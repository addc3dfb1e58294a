"""Where weights come from: tensors by the checkpoint's names, whatever the file format."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class WeightError(ValueError):
    """A checkpoint cannot be used. The message names file or tensor, what was expected, and
    what was found."""


class UnsupportedModel(WeightError):
    """The model needs what Shoal does not have; the message names it and what there is."""


class UnknownArchitecture(UnsupportedModel):
    """No entry of the registry is of the model's architecture."""


class WeightSource(Protocol):
    """The tensors of one checkpoint. Reading one is what touches its bytes."""

    @property
    def origin(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, by its name."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor as stored: float32, float16 or bfloat16. Raises WeightError if the bytes
        cannot be read or are of another type."""
        ...

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        """What a tensor holds at the runs `first .. end` along one dimension, joined. Touches
        little more than its bytes. Raises as `read`."""
        ...

    @property
    def bytes_read(self) -> int:
        """Of the file, so far."""
        ...


def need(values: Mapping[str, Any], key: str) -> Any:
    """A configuration's value. Raises WeightError where there is none."""
    if values.get(key) is None:
        raise WeightError(f"the model's configuration has no {key}")
    return values[key]
