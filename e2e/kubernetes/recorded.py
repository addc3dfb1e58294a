"""A server of external metrics whose loads are recorded series, and who asked it when.

The API server reaches it as it would reach the operator: over TLS, through the aggregation layer.
"""

import asyncio
import base64
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trustme
from aiohttp import web

from e2e.cluster.kube import Kube, Object
from e2e.cluster.layout import NODE_IP
from shoal.api.types import InferenceService
from shoal.operator.autoscale_load import Load
from shoal.operator.kube.external_metrics import Trust, application

NAME: Final = "recorded-metrics"


class RecordedLoads:
    """`now(key)`: (service, its load) at this moment. `asked` gets every question's time and what
    it was answered."""

    def __init__(self, now: Callable[[str], tuple[InferenceService, Load | None] | None]) -> None:
        self._now = now
        self.asked: dict[str, list[tuple[float, Load | None]]] = {}  # by service, time.monotonic()

    def service(self, key: str) -> InferenceService | None:
        found = self._now(key)
        return found[0] if found is not None else None

    def load(self, key: str) -> Load | None:
        found = self._now(key)
        load = found[1] if found is not None else None
        self.asked.setdefault(key, []).append((time.monotonic(), load))
        return load


@contextmanager
def serving(kube: Kube, namespace: str, loads: RecordedLoads, folder: Path) -> Iterator[None]:
    """Serves until the block is left, registered as external.metrics.k8s.io."""
    host = f"{NAME}.{namespace}.svc"
    authority = trustme.CA()
    pair = authority.issue_cert(host)
    config = kube.get("configmap", "extension-apiserver-authentication", "kube-system")
    trust = Trust(
        config["data"]["requestheader-client-ca-file"],
        tuple(json.loads(config["data"]["requestheader-allowed-names"])),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair.configure_cert(context)
    context.load_verify_locations(cadata=trust.authority)
    context.verify_mode = ssl.CERT_REQUIRED
    with _thread(loads, trust, context) as port:
        bundle = base64.b64encode(authority.cert_pem.bytes()).decode()
        kube.apply(namespace, *_objects(namespace, port), _registration(namespace, bundle))
        try:
            yield
        finally:
            kube.kubectl("delete", "apiservice", "v1beta1.external.metrics.k8s.io")


@contextmanager
def _thread(loads: RecordedLoads, trust: Trust, context: ssl.SSLContext) -> Iterator[int]:
    loop, started = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(application(loads, lambda: trust, time.time), access_log=None)
    ports: list[int] = []

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, NODE_IP, 0, ssl_context=context).start()
        ports.append(runner.addresses[0][1])
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10), "the server does not start"
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def _objects(namespace: str, port: int) -> Iterator[Object]:
    ports = [{"name": "https", "port": port, "protocol": "TCP"}]
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": namespace},
        "spec": {"ports": [{**ports[0], "port": 443, "targetPort": port}]},
    }
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": NAME},
        },
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": True}}],
    }


def _registration(namespace: str, bundle: str) -> Object:
    return {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
        "spec": {
            "group": "external.metrics.k8s.io",
            "version": "v1beta1",
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
            "service": {"name": NAME, "namespace": namespace, "port": 443},
            "caBundle": bundle,
        },
    }
