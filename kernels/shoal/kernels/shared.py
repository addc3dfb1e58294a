"""Tensors that pass between processes of one host through memory that they share.

A segment is a file that all members map (in /dev/shm, so it is memory). Counters in it tell who
has written what: see csrc/shared.cpp. A sum over the ranks of a decode step takes microseconds
this way; over sockets of the same host it takes a third of a millisecond, sixty times a token.
"""

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_shared.so")
FOLDER = Path("/dev/shm")
_LINE = 64  # bytes of a cache line, one counter each
_SPINS = 400  # rounds of a waiter, about 10 µs, before it sleeps
_DTYPES = (torch.float32, torch.bfloat16)


class PeerMissing(RuntimeError):
    """A member did not come to a meeting in time. `member` says which."""

    def __init__(self, member: int, seconds: float) -> None:
        super().__init__(f"member {member} did not come within {seconds:g} s")
        self.member = member


class Segment:
    """Zeroed memory of `size` bytes under a name that all members know."""

    def __init__(self, name: str, size: int, folder: Path = FOLDER) -> None:
        """Maps the file, made by whoever comes first. Raises OSError, and takes the name away,
        where the folder does not hold that much: the size of a container's /dev/shm is a setting
        of its own."""
        self.path = folder / name
        handle = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)
            self._map = mmap.mmap(handle, size)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(handle)
        self.bytes = torch.from_numpy(np.frombuffer(self._map, np.uint8))

    def unlink(self) -> None:
        """Takes the name away; the memory lives as long as somebody maps it. Idempotent."""
        self.path.unlink(missing_ok=True)


class Meeting:
    """Sums and gathers over the members of one segment. All members make the same calls, with
    the same shapes, in the same order; each has one thread for it."""

    def __init__(
        self, segment: Segment, members: int, me: int, slot_bytes: int, seconds: float
    ) -> None:
        """`slot_bytes`: what a member puts down at a time, longer messages go in parts;
        `seconds`: how long it waits for another. The segment has `size(members, slot_bytes)`."""
        self._segment = segment
        self._members, self._me, self._slot_bytes = members, me, slot_bytes
        self._seconds = seconds
        self._turn = 0
        self._library = _library()
        base = segment.bytes.data_ptr()
        self._words = base
        self._first = members * _LINE
        self._base = base

    @staticmethod
    def size(members: int, slot_bytes: int) -> int:
        return members * _LINE + 2 * members * slot_bytes

    def add_(self, values: Tensor) -> None:
        """values, contiguous and float32 or bfloat16, becomes its sum over the members: added in
        float32 and in the members' order, so that all have the same bits."""
        if values.dtype not in _DTYPES or not values.is_contiguous():
            raise ValueError(f"cannot sum {values.dtype} of strides {values.stride()}")
        pointer, item, left = values.data_ptr(), values.element_size(), values.numel()
        add = (
            self._library.shoal_sum_float32
            if values.dtype is torch.float32
            else self._library.shoal_sum_bfloat16
        )
        while left:
            count = min(left, self._slot_bytes // item)
            slots = self._put(pointer, count * item)
            add(pointer, slots, self._slot_bytes, self._members, count)
            pointer += count * item
            left -= count

    def gather(self, part: Tensor, root: int, sizes: list[int]) -> Tensor | None:
        """part [rows, sizes[me]] float32 of each member -> [rows, sum(sizes)] at `root`, None
        elsewhere."""
        rows = len(part)
        widest = 4 * max(sizes)
        at_once = max(1, self._slot_bytes // widest)
        if widest > self._slot_bytes:
            raise ValueError(f"a row of {widest} bytes exceeds the slots of {self._slot_bytes}")
        whole = torch.empty(rows, sum(sizes)) if self._me == root else None
        for first in range(0, rows, at_once):
            mine = part[first : first + at_once].contiguous()
            slots = self._put(mine.data_ptr(), mine.nbytes) - self._base
            if whole is None:
                continue
            column = 0
            for member, size in enumerate(sizes):
                start = slots + member * self._slot_bytes
                other = self._segment.bytes[start : start + 4 * len(mine) * size]
                whole[first : first + at_once, column : column + size] = other.view(
                    torch.float32
                ).view(len(mine), size)
                column += size
        return whole

    def _put(self, pointer: int, count: int) -> int:
        """Puts down `count` bytes, waits for all members' and returns the address of the first
        one's slot. A slot is used again two turns later: by then everybody has met once more, and
        so has read it."""
        half = self._turn % 2 * self._members * self._slot_bytes
        slots = self._base + self._first + half
        ctypes.memmove(slots + self._me * self._slot_bytes, pointer, count)
        self._turn = (self._turn + 1) & 0xFFFFFFFF
        missing = self._library.shoal_meet(
            self._words, self._members, self._me, self._turn, _SPINS, int(self._seconds * 1e9)
        )
        if missing >= 0:
            raise PeerMissing(missing, self._seconds)
        return slots


class Mailbox:
    """Messages from one process to another, in order, a few of them on the way at a time."""

    def __init__(self, segment: Segment, slots: int, slot_bytes: int, seconds: float) -> None:
        """The segment has `size(slots, slot_bytes)`. `seconds`: how long either side waits for
        the other."""
        self._segment = segment
        self._slots, self._slot_bytes, self._seconds = slots, slot_bytes, seconds
        self._library = _library()
        self._sent = segment.bytes.data_ptr()
        self._taken = self._sent + _LINE
        self._messages = self._sent + 2 * _LINE
        self._turn = 0

    @staticmethod
    def size(slots: int, slot_bytes: int) -> int:
        return 2 * _LINE + slots * slot_bytes

    def send(self, values: Tensor) -> None:
        """Copies a contiguous tensor out; waits only if the receiver is a boxful behind."""
        pointer, left = values.data_ptr(), values.nbytes
        while left:
            count = min(left, self._slot_bytes)
            free = (self._turn + 1 - self._slots) & 0xFFFFFFFF
            self._await(self._taken, free)
            ctypes.memmove(self._place(), pointer, count)
            self._turn = (self._turn + 1) & 0xFFFFFFFF
            self._library.shoal_post(self._sent, self._turn)
            pointer, left = pointer + count, left - count

    def receive(self, into: Tensor) -> Tensor:
        """Fills a contiguous tensor of the size of what was sent, and returns it."""
        pointer, left = into.data_ptr(), into.nbytes
        while left:
            count = min(left, self._slot_bytes)
            self._await(self._sent, (self._turn + 1) & 0xFFFFFFFF)
            ctypes.memmove(pointer, self._place(), count)
            self._turn = (self._turn + 1) & 0xFFFFFFFF
            self._library.shoal_post(self._taken, self._turn)
            pointer, left = pointer + count, left - count
        return into

    def _place(self) -> int:
        return self._messages + self._turn % self._slots * self._slot_bytes

    def _await(self, word: int, value: int) -> None:
        if not self._library.shoal_await(word, value, _SPINS, int(self._seconds * 1e9)):
            raise PeerMissing(0 if word == self._sent else 1, self._seconds)


def unavailable() -> str | None:
    """Why this process cannot share memory so; None where it can."""
    if not LIBRARY.exists():
        return "the library was not built (no C++ compiler at installation)"
    try:
        _library()
    except OSError as error:
        return f"the library cannot be loaded: {error}"
    return None if FOLDER.is_dir() else f"there is no {FOLDER}"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    word = ctypes.c_uint32
    for name, result, arguments in (
        ("shoal_post", None, (pointer, word)),
        ("shoal_await", integer, (pointer, word, integer, number)),
        ("shoal_meet", integer, (pointer, integer, integer, word, integer, number)),
        ("shoal_sum_float32", None, (pointer, pointer, number, integer, number)),
        ("shoal_sum_bfloat16", None, (pointer, pointer, number, integer, number)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
