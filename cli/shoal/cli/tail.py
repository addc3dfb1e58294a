"""Reads log files while they grow."""

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


class Tailer:
    """One log file from its start; one that was replaced or cut is read from its start again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._inode = -1
        self._rest = b""  # of a line that is not whole yet

    def read(self) -> list[str]:
        """The whole lines that came since the last call; [] where there is no file."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return []
        lines: list[str] = []
        replaced = self._file is not None and stat.st_ino != self._inode
        if self._file is not None and replaced:
            lines += self._take()  # what came before the file was moved away
        if self._file is None or replaced or stat.st_size < self._file.tell():
            self.close()
            self._file = self._path.open("rb")
            self._inode, self._rest = stat.st_ino, b""
        return lines + self._take()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self) -> list[str]:
        assert self._file is not None
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def last(lines: Iterable[str], count: int | None) -> list[str]:
    """The last `count` lines; all where `count` is None."""
    return list(lines) if count is None else list(deque(lines, maxlen=count))
