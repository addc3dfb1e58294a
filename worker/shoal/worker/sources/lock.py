"""One process at a time on a shared volume, by a lock that dies with its holder.

flock is released by the kernel however the holder ends, also on NFS and from another machine, so
there is no stale lock to clear. Where a file system has no such locks, work goes on without: it
may then be done twice, never half, since results are published by a rename.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from shoal.worker.sources.base import Fetch, SourceError

_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, fetch: Fetch, deadline: float) -> Iterator[bool]:
    """Holds the lock file `path`; yields False where the file system has no locks. `deadline` is
    of time.monotonic. Raises SourceError at the deadline, OSError for a file that cannot be
    opened."""
    handle = _open(path)
    try:
        yield _acquire(handle, path, fetch, deadline)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)  # of another user, who made it first


def _acquire(handle: int, path: Path, fetch: Fetch, deadline: float) -> bool:
    told = False
    while True:
        try:
            flock(handle, LOCK_EX | LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SourceError(
                    f"{fetch.uri}: another process has been installing it for more than"
                    f" {fetch.deadline_seconds:.0f} s (lock {path})"
                ) from None
            if not told:
                fetch.progress("waiting for another process that installs it", None)
                told = True
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            fetch.progress(f"{path.parent} has no file locks, going on without", None)
            return False
