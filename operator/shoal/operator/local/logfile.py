"""The log of one pod: its processes write to the file themselves, we only bound its size.

A process writes straight to the file (opened for appending), so no line is lost when the
supervisor is killed. A file that has grown too large is copied to `<name>.1` and cut to
nothing; lines written between the two are lost, a fair price for a bound on the disk.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 4096


class LogFile:
    """One file of at most about `limit` bytes, and one older beside it."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self._limit = limit

    @property
    def older(self) -> Path:
        return self.path.with_name(f"{self.path.name}.1")

    def begin(self) -> None:
        """A new pod under this name: what its namesake wrote is set aside."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self.older)

    def open(self) -> BinaryIO:
        """For a process to write to."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("ab", buffering=0)

    def note(self, line: str) -> None:
        """Adds a line of our own; one for which there is no room is lost."""
        with suppress(OSError), self.open() as file:
            file.write(f"--- {line}\n".encode())

    def rotate(self) -> bool:
        """Cuts the file if it is too large; returns whether it did."""
        try:
            if self.path.stat().st_size <= self._limit:
                return False
            self._copy()
            with self.path.open("r+b") as file:
                file.truncate(0)
        except FileNotFoundError:
            return False
        return True

    def last_line(self, longest: int = 300) -> str:
        """The last line that says something, ours left out; "" where none can be read."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines()]
        said = [line for line in lines if line and not line.startswith("--- ")]
        return said[-1][:longest] if said else ""

    def _copy(self) -> None:
        try:
            shutil.copyfile(self.path, self.older)
        except OSError:
            # On a full disk the bound is what helps; a part of a copy would only take room.
            self.older.unlink(missing_ok=True)
