"""Safetensors checkpoints, whole or in shards, read through memory maps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.worker.model.weights import WeightError

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class SafetensorsSource:
    """The tensors of a folder's `*.safetensors` files."""

    def __init__(self, folder: Path) -> None:
        """Opens every shard and reads its table. Raises WeightError where there is none, where
        one that the index names is missing, or where one is cut off."""
        self.origin = str(folder)
        self.bytes_read = 0
        self._handles: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _shards(folder):
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
                shapes[name] = tuple(handle.get_slice(name).get_shape())
                self._handles[name] = handle
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, name: str) -> Tensor:
        return self._checked(name, self._handles[name].get_tensor(name))

    def raw(self, name: str) -> Tensor:
        """A tensor of any type, as codes and their scales are stored."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor

    def read_runs(self, name: str, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
        stored = self._handles[name].get_slice(name)
        before = (slice(None),) * dim
        parts = [stored[(*before, slice(first, end))] for first, end in runs]
        return self._checked(name, parts[0] if len(parts) == 1 else torch.cat(parts, dim))

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        self.bytes_read += tensor.nbytes
        if tensor.dtype not in _FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
            found = str(tensor.dtype).removeprefix("torch.")
            raise WeightError(
                f"{self.origin}: tensor {name} holds {found}, expected one of {kinds}; "
                "config.json has no quantization_config that says how it is quantized"
            )
        return tensor


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightError(f"{index}: not an index of safetensors shards ({error})") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise WeightError(f"{index} names {absent[0]}, which is not there")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightError(f"{folder} has no *.safetensors file")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        size = file.stat().st_size
        raise WeightError(
            f"{file} ({size} bytes) is truncated or no safetensors file: {error}"
        ) from error
