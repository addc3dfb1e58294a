"""A port of a pod, on this machine for as long as it is needed: what `kubectl port-forward` does.

One connection, over the API server's websocket, behind a Unix socket that only this user can
open.
"""

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shoal.cli.errors import CliError
from shoal.cli.kube.client import KubeClient

_CHUNK = 65_536


@contextmanager
def forwarded(client: KubeClient, namespace: str, pod: str, port: int) -> Iterator[str]:
    """The address for gRPC, good for one connection. Raises CliError."""
    from kubernetes.client.exceptions import ApiException
    from kubernetes.stream.ws_client import portforward_call

    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/portforward"
    url, headers = client.signed(path, [("ports", str(port))])
    # The package's websocket client reads lower-case names alone.
    headers = {name.lower(): value for name, value in headers.items()}
    try:
        remote = portforward_call(client.configuration, "GET", url, headers=headers)
    except ApiException as error:
        raise CliError(
            f"pod {namespace}/{pod} cannot be reached through the API server (this needs the right "
            f"to create pods/portforward): {str(error.reason).splitlines()[0]}"
        ) from error
    with (
        tempfile.TemporaryDirectory(prefix="shoal-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address = Path(folder) / "router"
        listener.bind(str(address))
        listener.listen(1)
        pump = threading.Thread(target=_serve, args=(listener, remote.socket(port)), daemon=True)
        pump.start()
        try:
            yield f"unix:{address}"
        finally:
            remote.close()


def _serve(listener: socket.socket, remote: Any) -> None:
    """Connects the first who comes with the pod."""
    with suppress(OSError):
        local, _ = listener.accept()
        back = threading.Thread(target=_copy, args=(remote, local), daemon=True)
        back.start()
        _copy(local, remote)
        back.join()
        local.close()


def _copy(source: Any, target: Any) -> None:
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
