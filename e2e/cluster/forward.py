"""A way to a Service of a cluster that this machine is no node of."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from e2e import tools
from e2e.cluster.command import attached, wait_for
from e2e.cluster.kube import Kube

ANSWER_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.5


class Forward:
    """`kubectl port-forward`, started again when the pod that it goes to is gone."""

    def __init__(self, kube: Kube, namespace: str, service: str, port: str) -> None:
        self._port = _free_port()
        ports = f"{self._port}:{port}"
        there = ("--namespace", namespace, "port-forward", f"service/{service}", ports)
        self._command = attached(tools.kubectl(), "--kubeconfig", kube.kubeconfig, *there)
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)

    @property
    def url(self) -> str:
        """Once something answers there. Raises ClusterError."""
        wait_for("the forwarded port", ANSWER_SECONDS, self._answers)
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._process is not None:
            self._process.kill()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as self._process:
                pass
            self._stop.wait(_PAUSE_SECONDS)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False


@contextmanager
def forwarded(kube: Kube, namespace: str, service: str, port: str) -> Iterator[Forward]:
    """Open until the end of the block."""
    forward = Forward(kube, namespace, service, port)
    forward.start()
    try:
        yield forward
    finally:
        forward.stop()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
