"""Packed weights kept on the cache volume, so that the next start maps them and computes nothing.

A file is named by a digest of everything that decides its bytes: the checkpoint's files, the
precision, the quantization, the native library and this format. It is written beside its place
and renamed, so that a reader finds a whole one or none; who finds somebody else writing lets them.
Mapped, its pages are shared by all replicas of a machine and need not be read before they are used.

    b"SHOALPK1" | length of the header, 8 bytes | header, JSON | tensors, each at a multiple of 64
"""

import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from shoal.kernels.native import LIBRARY, PackedWeight
from shoal.worker.logs import event

log: Final = logging.getLogger(__name__)

_MAGIC: Final = b"SHOALPK1"
_ALIGNMENT: Final = 64  # of a cache line, and of the widest vector
_KEPT: Final = 8  # files; each is as large as its model's weights
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "int32": torch.int32,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_PARTS: Final = ("packed", "scales", "sums", "bias")


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One layer as step programs take it."""

    attention_norm: Tensor
    qkv: PackedWeight
    output: PackedWeight
    mlp_norm: Tensor
    inner: PackedWeight  # gate and up, interleaved
    down: PackedWeight


@dataclass(frozen=True, slots=True)
class PackedModel:
    """All weights of a model as step programs take them."""

    embedding: Tensor
    layers: tuple[PackedLayer, ...]
    norm: Tensor
    head: PackedWeight


class PackedStore:
    """Packed weights of one checkpoint, in one precision and quantization."""

    def __init__(self, folder: Path, checkpoint: Path, precision: str, quantization: str) -> None:
        """`folder` need not be there. OSError for a checkpoint that cannot be looked at."""
        self._path = folder / f"{_digest(checkpoint, precision, quantization)}.packed"

    def load(self) -> PackedModel | None:
        """The weights, mapped; None where there are none, or none that can be used."""
        try:
            with self._path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            model = _read(mapped)
        except OSError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s is of no use: %s; it is made anew", self._path, error)
            with suppress(OSError):
                self._path.unlink()
            return None
        with suppress(OSError):
            mapped.madvise(mmap.MADV_WILLNEED)
            os.utime(self._path)  # it is in use
        return model

    def save(self, model: PackedModel) -> bool:
        """Writes the weights; False where somebody else does, or did, or it cannot be done: the
        next start takes longer, and nothing else is lost."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with (self._path.parent / "packed.lock").open("a") as lock:
                try:
                    flock(lock, LOCK_EX | LOCK_NB)
                except BlockingIOError:
                    return False
                if self._path.exists():
                    return False
                self._write(model)
                self._tidy()
        except OSError as error:
            log.warning("packed weights are not kept in %s: %s", self._path.parent, error)
            return False
        event(log, "packed weights kept", path=str(self._path))
        return True

    def _write(self, model: PackedModel) -> None:
        handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in _pieces(model):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(self._path)
        finally:
            Path(name).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Removes what a writer that was killed left behind, and the files used longest ago."""
        folder = self._path.parent
        for left in folder.glob("*.new"):
            left.unlink(missing_ok=True)
        files = sorted(folder.glob("*.packed"), key=lambda path: path.stat().st_mtime)
        for old in files[:-_KEPT]:
            old.unlink(missing_ok=True)  # who has it mapped keeps it


def _digest(checkpoint: Path, precision: str, quantization: str) -> str:
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.iterdir())
    stats = [(path.name, path.stat()) for path in files if path.is_file()]
    said = {
        "format": _MAGIC.decode(),
        "library": hashlib.sha256(LIBRARY.read_bytes()).hexdigest(),
        "precision": precision,
        "quantization": quantization,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "path": str(checkpoint.resolve()),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:40]


def _pieces(model: PackedModel) -> Iterator[bytes | memoryview]:
    """The file's content, in order."""
    entries: list[dict[str, Any]] = []
    offset = 0
    tensors = list(_tensors(model))
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        entries.append(
            {
                "name": name,
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "offset": offset,
            }
        )
        offset += _padded(size)
    sizes = {name: [weight.n, weight.k] for name, weight in _weights(model)}
    layers = len(model.layers)
    header = {"tensors": entries, "weights": sizes, "layers": layers, "bytes": offset}
    text = json.dumps(header).encode()
    start = _padded(len(_MAGIC) + 8 + len(text))
    text = text.ljust(start - len(_MAGIC) - 8)
    yield _MAGIC + len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        data = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
        yield data
        yield b"\0" * (_padded(len(data)) - len(data))


def _read(mapped: mmap.mmap) -> PackedModel:
    """ValueError, KeyError or TypeError for what is no such file."""
    if mapped[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it is of another format")
    start = len(_MAGIC) + 8
    length = int.from_bytes(mapped[len(_MAGIC) : start], "little")
    header = json.loads(mapped[start : start + length])
    body = start + length
    if len(mapped) != body + header["bytes"]:
        raise ValueError(f"it has {len(mapped)} bytes, expected {body + header['bytes']}")
    tensors: dict[str, Tensor] = {}
    for entry in header["tensors"]:
        count = 1
        for size in entry["shape"]:
            count *= size
        tensors[entry["name"]] = torch.frombuffer(
            mapped, dtype=_DTYPES[entry["dtype"]], count=count, offset=body + entry["offset"]
        ).view(entry["shape"])

    def weight(name: str) -> PackedWeight:
        n, k = header["weights"][name]
        parts = {part: tensors.get(f"{name}.{part}") for part in _PARTS}
        packed = tensors[f"{name}.packed"]
        return PackedWeight.of_parts(
            n, k, packed, scales=parts["scales"], sums=parts["sums"], bias=parts["bias"]
        )

    def layer(index: int) -> PackedLayer:
        prefix = f"layers.{index}."
        return PackedLayer(
            attention_norm=tensors[f"{prefix}attention_norm"],
            qkv=weight(f"{prefix}qkv"),
            output=weight(f"{prefix}output"),
            mlp_norm=tensors[f"{prefix}mlp_norm"],
            inner=weight(f"{prefix}inner"),
            down=weight(f"{prefix}down"),
        )

    return PackedModel(
        embedding=tensors["embedding"],
        layers=tuple(layer(index) for index in range(header["layers"])),
        norm=tensors["norm"],
        head=weight("head"),
    )


def _weights(model: PackedModel) -> Iterator[tuple[str, PackedWeight]]:
    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}."
        yield f"{prefix}qkv", layer.qkv
        yield f"{prefix}output", layer.output
        yield f"{prefix}inner", layer.inner
        yield f"{prefix}down", layer.down
    yield "head", model.head


def _tensors(model: PackedModel) -> Iterator[tuple[str, Tensor]]:
    yield "embedding", model.embedding
    yield "norm", model.norm
    for index, layer in enumerate(model.layers):
        yield f"layers.{index}.attention_norm", layer.attention_norm
        yield f"layers.{index}.mlp_norm", layer.mlp_norm
    for name, weight in _weights(model):
        for part in _PARTS:
            tensor = getattr(weight, part)
            if tensor is not None:
                yield f"{name}.{part}", tensor


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
