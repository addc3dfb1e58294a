"""Reads of the API server without a kubectl process each.

A test that waits asks twice a second or more, for minutes, on the cores on which the engines start
that it waits for: a kubectl costs 80 ms of processor time, a request 3.
"""

import json
import ssl
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from e2e.cluster.layout import ClusterError
from shoal.operator.kube.access import Access, NoAccess, load_access

_CORE: Final = "/api/v1"
# By the words that tests use; kubectl reads all others.
_PLACES: Final = {
    "infs": ("/apis/serving.shoal.dev/v1alpha1", "inferenceservices"),
    "pod": (_CORE, "pods"),
    "service": (_CORE, "services"),
    "configmap": (_CORE, "configmaps"),
    "event": (_CORE, "events"),
    "node": (_CORE, "nodes"),
    "deployment": ("/apis/apps/v1", "deployments"),
    "lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "hpa": ("/apis/autoscaling/v2", "horizontalpodautoscalers"),
}
_CLUSTERWIDE: Final = ("nodes",)


@dataclass(frozen=True)
class Reader:
    """Whoever `access` names. A connection a request: any thread may ask at any time."""

    access: Access
    context: ssl.SSLContext

    def text(self, path: str, seconds: float = 60.0) -> str:
        """What is at an API path. Raises ClusterError."""
        address = urlsplit(self.access.server)
        assert address.hostname is not None, "it was parsed out of a kubeconfig"
        connection = HTTPSConnection(
            address.hostname, address.port or 443, timeout=seconds, context=self.context
        )
        token = self.access.token.value()
        try:
            connection.request(
                "GET",
                address.path.rstrip("/") + path,
                headers={"Authorization": f"Bearer {token}"} if token else {},
            )
            answer = connection.getresponse()
            said = answer.read().decode()
        except (OSError, HTTPException) as error:
            raise ClusterError(f"GET {path}: {error!r}") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise ClusterError(f"GET {path}: {answer.status} {said[-2000:]}")
        return said

    def json(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text(path))
        return found


def open_reader(kubeconfig: Path) -> Reader | None:
    """None where kubectl alone can log in: by a command, or over plain HTTP."""
    try:
        access = load_access({}, time.monotonic, kubeconfig=kubeconfig)
    except NoAccess:
        return None
    if not access.server.startswith("https://"):
        return None
    return Reader(access, access.ssl_context())


def path_of(
    kind: str, namespace: str | None, name: str | None = None, selector: str = ""
) -> str | None:
    """Where an object or the objects of a kind are, all namespaces' where none is named; None for
    a kind that is not known here."""
    place = _PLACES.get(kind) or _PLACES.get(kind.removesuffix("s"))
    if place is None:
        return None
    group, plural = place
    if name is not None and namespace is None:
        namespace = "default"  # as kubectl has it
    whole = namespace is None or plural in _CLUSTERWIDE
    where = f"{group}/{plural}" if whole else f"{group}/namespaces/{namespace}/{plural}"
    if name is not None:
        return f"{where}/{name}"
    return f"{where}?{urlencode({'labelSelector': selector})}" if selector else where
