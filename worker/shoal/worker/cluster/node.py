"""`python -m shoal.worker.cluster node`: this machine's part of a Ray cluster, as one process.

    start (ray start) -> say "ready ADDRESS" -> watch -> end all

`ray start` leaves daemons behind that outlive whoever called it. This process adopts them, ends
when the first of them does, and ends them all however it ends itself: by a signal, or when
whoever holds its lifeline is gone.
"""

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from shoal.api.names import ENV_LIFELINE
from shoal.worker.cluster.ray_env import ENV_TOKEN_PATH, ray_environment

HEAD_PORT: Final = 6379
START_SECONDS: Final = 180.0  # of `ray start`; a few when the machine is at rest
_LOOK_SECONDS: Final = 0.2
_END_SECONDS: Final = 5.0
_ADOPT_ORPHANS: Final = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_OBJECT_STORE_BYTES: Final = 100_000_000  # nothing of ours goes through it
_RAY: Final = "ray.scripts.scripts"  # by its module: a script may lie elsewhere than its Python
_NOT_THERE: Final = "No module named"
_LOOPBACK: Final = "127.0.0.1"
_ATTEMPTS: Final = 3
_TOO_SLOW: Final = "timed out during startup"
_ESSENTIAL: Final = ("raylet", "gcs_server")


class NodeError(RuntimeError):
    """Ray does not start, or one of its processes ended."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What to start. `address` of the head for a follower, None for a head."""

    ip: str
    ranks: int  # that this node takes on its processors
    gpus: int = 0
    address: str | None = None
    port: int = HEAD_PORT  # of a head; 0: a free one

    def command(self, temp_dir: str) -> list[str]:
        """Of `ray start`."""
        where = (
            [f"--address={self.address}"]
            if self.address is not None
            else ["--head", f"--port={self.port}", "--include-dashboard=false"]
        )
        return [
            *(sys.executable, "-m", _RAY, "start", *where),
            *(f"--node-ip-address={self.ip}", f"--temp-dir={temp_dir}"),
            *(f"--num-cpus={self.ranks}", f"--num-gpus={self.gpus}"),
            *(f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"),
            *(
                "--no-monitor",
                "--include-log-monitor=false",
                "--log-style=record",
                "--log-color=false",
            ),
        ]


class RayNode:
    """Ray's processes on this machine. Used as a context: at its end they are gone."""

    def __init__(self, spec: NodeSpec, environ: Mapping[str, str] = os.environ) -> None:
        self._spec = spec
        # Below /tmp and short: a socket's path has 107 characters at most.
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))
        own_token = self._folder / "token"
        self.token_path = Path(environ.get(ENV_TOKEN_PATH, own_token))
        if spec.address is None and self.token_path == own_token:
            own_token.touch(0o600)
            own_token.write_text(os.urandom(32).hex())
        self._environ = ray_environment(environ, str(self.token_path))
        self._essential: list[tuple[str, psutil.Process]] = []

    def start(self) -> None:
        """Starts Ray, and returns when it is up: a follower has joined by then. Raises
        NodeError."""
        adopt_orphans()
        for _ in range(_ATTEMPTS):
            if (why := self._try()) is None:
                break
            _end_descendants()
            # Ray gives itself half a minute, which a busy machine may not have.
            if _TOO_SLOW not in why:
                raise NodeError(why)
        else:
            raise NodeError(why)
        named = [(one.name(), one) for one in _descendants()]
        self._essential = [(name, one) for name, one in named if name in _ESSENTIAL]
        if not self._essential:
            raise NodeError("ray start left no process behind that could serve")

    def _try(self) -> str | None:
        """One `ray start`; why it failed, or None."""
        # Its daemons would keep a pipe open.
        with tempfile.TemporaryFile("w+") as said:
            try:
                done = subprocess.run(
                    self._spec.command(str(self._folder)),
                    env=self._environ,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    timeout=START_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return f"ray start took more than {START_SECONDS:g} s"
            said.seek(0)
            last = " / ".join(said.read().strip().splitlines()[-3:])
            if done.returncode and _NOT_THERE in last:
                raise NodeError(
                    "Ray is not installed: it comes with pip install 'shoal[worker,ray]'"
                )
            return f"ray start ended with {done.returncode}: {last}" if done.returncode else None

    def ended(self) -> str | None:
        """Which of Ray's processes is gone, or None while all live."""
        for name, process in self._essential:
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                return f"Ray's {name} on this node ended"
        return None

    def close(self) -> None:
        """Ends all processes below this one. Idempotent."""
        _end_descendants()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "RayNode":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def adopt_orphans() -> None:
    """Daemons below this process become its children, not those of the first process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0) != 0:
        raise NodeError(f"prctl: {os.strerror(ctypes.get_errno())}")


def stopping() -> threading.Event:
    """Set by SIGTERM, SIGINT, and by the end of the lifeline where there is one."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if os.environ.get(ENV_LIFELINE) == "stdin":

        def wait() -> None:
            while os.read(0, 4096):
                pass
            stop.set()

        threading.Thread(target=wait, name="lifeline", daemon=True).start()
    return stop


def watch(
    node: RayNode, stop: threading.Event, other: Callable[[], str | None] = lambda: None
) -> int:
    """Returns when it is told to, 0, or when Ray's processes end or there is some `other` reason
    to, 1."""
    while not stop.wait(_LOOK_SECONDS):
        reap()
        if (why := node.ended() or other()) is not None:
            print(f"shoal worker: {why}", file=sys.stderr, flush=True)
            return 1
    return 0


def reap() -> None:
    """Takes note of adopted processes that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 stopped, 1 Ray ended or did not start."""
    parser = argparse.ArgumentParser(prog="python -m shoal.worker.cluster node")
    parser.add_argument("--ip", default=own_address())
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=own_gpus())
    args = parser.parse_args(arguments)
    stop = stopping()
    port = args.port or free_port(args.ip)
    with RayNode(NodeSpec(args.ip, args.ranks, args.gpus, port=port)) as node:
        try:
            node.start()
        except NodeError as error:
            print(f"shoal worker: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"ready {args.ip}:{port} {node.token_path}", flush=True)
        return watch(node, stop)


def own_address(towards: str = "198.51.100.1") -> str:
    """This machine's address on the way to another one; where there is no way, that of its first
    interface that leads anywhere, or loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # of UDP: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            found = psutil.net_if_addrs().values()
            ours = [one.address for some in found for one in some if one.family == socket.AF_INET]
            return next((address for address in ours if not address.startswith("127.")), _LOOPBACK)


def own_gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA's devices that this machine, or this container, has."""
    return sum(1 for _ in devices.glob("nvidia[0-9]*"))


def free_port(ip: str) -> int:
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])


def _end_descendants() -> None:
    deadline = time.monotonic() + _END_SECONDS
    while (found := _descendants()) and time.monotonic() < deadline:
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=0.5)


def _descendants() -> list[psutil.Process]:
    try:
        return psutil.Process().children(recursive=True)
    except psutil.NoSuchProcess:
        return []
