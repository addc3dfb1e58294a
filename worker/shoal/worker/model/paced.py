"""A checkpoint that is read piece by piece beside other work, and looked at on the way."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from shoal.worker.model.weights import WeightError, WeightSource

_CHUNK = 1 << 20
_PIECE = 1 << 20  # values that are looked at in one go


class BrokenWeights(WeightError):
    """The files are there and read well, but what they hold cannot be served."""


class PacedSource:
    """The tensors of another source, one at a time: `pace` is called before each and while it is
    looked at, `progress` with the share of the elements that has been read."""

    def __init__(
        self,
        source: WeightSource,
        pace: Callable[[], None],
        progress: Callable[[float], None],
    ) -> None:
        self._source = source
        self._pace = pace
        self._progress = progress
        self._all = max(1, sum(map(prod, source.shapes.values())))
        self._read = 0

    @property
    def origin(self) -> str:
        return self._source.origin

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._source.shapes

    def read(self, name: str) -> Tensor:
        """Raises BrokenWeights for values that are not finite, and what `pace` raises."""
        self._pace()
        return self._looked_at(name, self._source.read(name))

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Raises as `read`."""
        self._pace()
        return self._looked_at(name, self._source.read_runs(name, dim, runs))

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def _looked_at(self, name: str, tensor: Tensor) -> Tensor:
        for piece in torch.split(tensor.reshape(-1), _PIECE):
            if not bool(piece.isfinite().all()):
                raise BrokenWeights(
                    f"{self.origin}: tensor {name} holds values that are not finite, expected "
                    "numbers"
                )
            self._pace()
        self._read += tensor.numel()
        self._progress(min(1.0, self._read / self._all))
        return tensor


def sha256_of(path: Path, pace: Callable[[], None]) -> str:
    """The SHA-256 of a weight file, or of the lines `<digest>  <name>` of a folder's weight
    files in order of their names (what `sha256sum *.safetensors | sha256sum` prints)."""
    if path.is_file():
        return _digest(path, pace)
    lines = [f"{_digest(file, pace)}  {file.name}\n" for file in sorted(path.glob("*.safetensors"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(file: Path, pace: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            pace()
    return digest.hexdigest()
