"""A cluster for one test run, gone when the run is, whatever ends it.

Beside the run lives a guard, a process of a session of its own. It reads a pipe whose other end
the run holds: the kernel closes that however the run ends, SIGKILL included, and then the guard
takes down what is still there.
"""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from e2e.cluster import node
from e2e.cluster.command import ENVIRON, Say, wait_for
from e2e.cluster.layout import CHECKOUT, Layout

EXIT_SECONDS: Final = 30.0  # between the end of a run's files and the end of its process


@contextmanager
def own_cluster(layout: Layout, say: Say) -> Iterator[bool]:
    """A cluster that is up; True where it is this run's, and then it goes at the end. Raises
    ClusterError."""
    with one_at_a_time(layout.cache / "session.lock", say), _guarded(layout):
        started = node.up(layout, say, owned=True)
        try:
            yield started
        finally:
            kept = node.keep_logs(layout)
            if started:
                node.down(layout)
                say(f"the cluster is gone; logs of its processes: {kept}")


@contextmanager
def one_at_a_time(path: Path, say: Say) -> Iterator[None]:
    """Runs share a machine's one cluster in turn: each installs Shoal under the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run uses the cluster: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _guarded(layout: Layout) -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-m", "e2e.cluster.guard", str(layout.run), str(layout.cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=CHECKOUT,
        env=dict(ENVIRON),
        start_new_session=True,  # what ends the run's process group does not end the guard
    ):
        yield


def watch(layout: Layout) -> bool:
    """Waits for the end of standard input; whether there was a cluster left to take down. One
    that the run has ended itself, or that is somebody else's, is left alone."""
    while sys.stdin.buffer.read(4096):
        pass
    claim = node.read_claim()
    if claim is None or claim.run != layout.run or claim.owner is None:
        return False
    wait_for("the run's end", EXIT_SECONDS, claim.orphaned)
    node.keep_logs(layout)
    node.down(layout)
    return True


if __name__ == "__main__":
    watch(Layout(Path(sys.argv[1]), Path(sys.argv[2])))
