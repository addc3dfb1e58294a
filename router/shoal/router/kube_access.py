"""How a pod reaches its cluster's API server: with its service account, as the kubelet mounts it.

The kubelet renews the token while the process runs, and a CA bundle can change as well, so both
are read anew whenever they are used.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class NoServiceAccount(Exception):
    """This process cannot talk to an API server; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """Where the API server is, and the folder with `token` and `ca.crt`."""

    server: str  # https://host:port
    folder: Path = MOUNT

    @classmethod
    def of_pod(cls, environ: Mapping[str, str], folder: Path = MOUNT) -> "ServiceAccount":
        """As the kubelet tells a container. Raises NoServiceAccount."""
        host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise NoServiceAccount(
                "--routes kubernetes works in a pod: KUBERNETES_SERVICE_HOST and "
                "KUBERNETES_SERVICE_PORT are not set. Elsewhere give --routes a folder"
            )
        for name in ("token", "ca.crt"):
            if not (folder / name).is_file():
                raise NoServiceAccount(
                    f"--routes kubernetes needs a service account: {folder / name} is not there. "
                    "Set serviceAccountName, and automountServiceAccountToken to true, in the pod"
                )
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", folder)

    def headers(self) -> dict[str, str]:
        """Of a request made now. Raises OSError."""
        token = (self.folder / "token").read_text().strip()
        return {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    def trust(self) -> ssl.SSLContext:
        """The CA bundle as it is now. Raises OSError."""
        return ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
