"""Who serves from a state directory: at most one supervisor, known by a lock that dies with it."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from shoal.operator.local import files
from shoal.operator.local.records import SupervisorInfo

ENV_STATE_DIR: Final = "SHOAL_STATE_DIR"
_PATIENCE_SECONDS: Final = 0.5


class SupervisorRuns(RuntimeError):
    """Another supervisor holds the state directory."""

    def __init__(self, root: Path, info: SupervisorInfo | None) -> None:
        who = f"process {info.pid} ({info.url})" if info else "another process"
        super().__init__(
            f"{who} already serves from {root}; add to it with shoal apply -f FILE, or stop it, "
            f"or name another state directory with --state-dir or {ENV_STATE_DIR}"
        )
        self.info = info


class SupervisorLock:
    """The lock of the state directory at `root`, and beside it who holds it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = root / "supervisor.lock"
        self._info = root / "supervisor.json"

    def holder(self) -> SupervisorInfo | None:
        """The supervisor that runs, or None where none does."""
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return None if _locked(handle, fcntl.LOCK_SH) else self._read()
        finally:
            os.close(handle)

    @contextmanager
    def hold(self, info: SupervisorInfo) -> Iterator[None]:
        """Holds the lock in this context. Raises SupervisorRuns where somebody else does."""
        self._root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # A reader that asks for the `holder` has the lock for an instant too.
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _locked(handle, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise SupervisorRuns(self._root, self._read())
                time.sleep(0.02)
            files.write_json(self._info, asdict(info))
            yield
            self._info.unlink(missing_ok=True)
        finally:
            os.close(handle)

    def _read(self) -> SupervisorInfo | None:
        document = files.read_json(self._info) or {}
        try:
            return SupervisorInfo(**document)  # type: ignore[arg-type]  # written by `hold`
        except TypeError:
            return None


def _locked(handle: int, kind: int) -> bool:
    """Whether the lock could be taken; it is given back when `handle` is closed."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
