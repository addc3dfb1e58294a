"""Checksums of weights as they lie in memory, packed, name by name."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Final

import torch
from torch import Tensor

# About a millisecond of work: beside an engine that serves, a longer burst is a slow step.
PIECE_BYTES: Final = 2 << 20


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors that hang on a value through fields, slots, attributes and containers."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name), _joined(name, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, part in enumerate(value):
            yield from tensors_of(part, _joined(name, str(index)))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, _joined(name, str(key)))
    elif type(value).__module__.startswith("shoal."):
        for part in (*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", ())):
            yield from tensors_of(getattr(value, part, None), _joined(name, part))


def fingerprint(weights: object, pace: Callable[[], None]) -> dict[str, int]:
    """CRC-32 of every tensor by name; `pace` is called after each piece of one."""
    found = {}
    for name, tensor in tensors_of(weights):
        plain = tensor.to_dense() if tensor.layout is not torch.strided else tensor
        data = plain.detach().contiguous().view(-1).view(torch.uint8)
        crc = 0
        for piece in torch.split(data, PIECE_BYTES):
            crc = zlib.crc32(piece.numpy().data, crc)
            pace()
        found[name] = crc
    return found


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
