"""The head of a GGUF file: metadata and the table of tensors, read without touching the data.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader`
builds a numpy view for every element, which takes seconds where a vocabulary is an array of
strings; this reader takes milliseconds.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_MAGIC = b"GGUF"
_STRING = 8
_ARRAY = 9
# GGUF's type number -> struct code, little endian.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMENSIONS = 8


class InvalidGguf(ValueError):
    """The file is no GGUF this reader understands, or is cut off; the message says where."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in GGUF's order: the fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int  # gguf.GGMLQuantizationType
    offset: int  # of its first byte, from the start of the file


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, Value]
    tensors: tuple[GgufTensor, ...]


class _Cursor:
    """Reads forward through a buffer; running past its end is InvalidGguf."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, code: str) -> int | float | bool:
        try:
            value: int | float | bool = struct.unpack_from("<" + code, self.data, self.at)[0]
        except struct.error:
            raise self.cut() from None
        self.at += struct.calcsize("<" + code)
        return value

    def length(self, code: str = "Q") -> int:
        value = int(self.number(code))
        if value > len(self.data):
            raise InvalidGguf(f"a length of {value} at byte {self.at} exceeds the file")
        return value

    def string(self) -> str:
        size = self.length()
        end = self.at + size
        if end > len(self.data):
            raise self.cut()
        text = self.data[self.at : end].decode("utf-8", "surrogateescape")
        self.at = end
        return text

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise InvalidGguf(f"unknown value type {kind} at byte {self.at}")
        return self.number(_SCALARS[kind])

    def array(self) -> list[Scalar]:
        kind = int(self.number("I"))
        count = self.length()
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise InvalidGguf(f"unknown array element type {kind} at byte {self.at}")
        layout = f"<{count}{_SCALARS[kind]}"
        try:
            values = struct.unpack_from(layout, self.data, self.at)
        except struct.error:
            raise self.cut() from None
        self.at += struct.calcsize(layout)
        return list(values)

    def cut(self) -> InvalidGguf:
        return InvalidGguf(f"the file ends at byte {len(self.data)}, within its header")


def read_header(path: Path) -> GgufHeader:
    """Reads metadata and tensor table of a GGUF file (versions 2 and 3, little endian).

    Raises InvalidGguf with the file's path in the message; OSError if it cannot be read."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise InvalidGguf("too short to be a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data))
    except InvalidGguf as error:
        raise InvalidGguf(f"{path}: {error}") from None


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.data[:4] != _MAGIC:
        raise InvalidGguf("not a GGUF file (its first four bytes are not 'GGUF')")
    cursor.at = 4
    version = cursor.number("I")
    if version not in (2, 3):
        raise InvalidGguf(f"GGUF version {version} is not supported (2 and 3 are)")
    tensor_count, value_count = cursor.length(), cursor.length()
    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(int(cursor.number("I")))
    table: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = int(cursor.number("I"))
        if dimensions > _MAX_DIMENSIONS:
            raise InvalidGguf(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(int(cursor.number("Q")) for _ in range(dimensions))
        table.append((name, shape, int(cursor.number("I")), int(cursor.number("Q"))))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise InvalidGguf(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        metadata, tuple(GgufTensor(n, s, kind, start + offset) for n, s, kind, offset in table)
    )
