"""Serves external.metrics.k8s.io/v1beta1, where HorizontalPodAutoscalers read a service's load.

The API server's aggregation layer decides who may read and passes requests on with a client
certificate of its own authority (the ConfigMap extension-apiserver-authentication in kube-system);
nobody else is answered. Selectors must name one service by `serving.shoal.dev/service`.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote

from aiohttp import web

from shoal.api.names import LABEL_SERVICE
from shoal.api.types import InferenceService
from shoal.operator.autoscale_load import Load
from shoal.operator.external import FILLED, METRIC_NAMES, quantity, values
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import CONFIG_MAPS

log: Final = logging.getLogger(__name__)

GROUP_VERSION: Final = "external.metrics.k8s.io/v1beta1"
_PREFIX: Final = f"/apis/{GROUP_VERSION}"
_METRICS: Final = (*METRIC_NAMES.values(), FILLED)
_TRUST: Final = ("kube-system", "extension-apiserver-authentication")
_REFRESH_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 5.0


class Loads(Protocol):
    """Who knows the load of services that others scale, by `namespace/name`."""

    def service(self, key: str) -> InferenceService | None: ...

    def load(self, key: str) -> Load | None: ...


@dataclass(frozen=True, slots=True)
class ServingFiles:
    """The certificate that the aggregation layer checks, as PEM files that others replace."""

    certificate: Path
    key: Path

    def written(self) -> tuple[float, float]:
        """Changes when they are replaced. OSError where they are not there."""
        return self.certificate.stat().st_mtime, self.key.stat().st_mtime


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose requests are answered: client certificates of `authority` with one of these names."""

    authority: str  # PEM
    names: tuple[str, ...]  # (): any

    def admits(self, certificate: Mapping[str, Any] | None) -> bool:
        """`certificate` as ssl describes it; its chain was checked already."""
        if certificate is None:
            return False
        subject = dict(pair for part in certificate.get("subject", ()) for pair in part)
        return not self.names or subject.get("commonName") in self.names


async def read_trust(api: Api) -> Trust | None:
    """What the cluster says about its aggregation layer; None where it has none. ApiError."""
    config = await api.get(CONFIG_MAPS, *_TRUST)
    data = config.get("data") or {}
    if not (authority := data.get("requestheader-client-ca-file")):
        return None
    return Trust(authority, tuple(json.loads(data.get("requestheader-allowed-names") or "[]")))


def application(
    loads: Loads, trust: Callable[[], Trust | None], wall: Callable[[], float]
) -> web.Application:
    """The API. `trust()` None: requests are not checked (there is no TLS)."""

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        trusted = trust()
        peer = request.transport.get_extra_info("peercert") if request.transport else None
        if trusted is not None and not trusted.admits(peer):
            return _status(401, "Unauthorized", "only the API server's aggregation layer may ask")
        response: web.StreamResponse = await handler(request)
        return response

    async def discovery(_: web.Request) -> web.Response:
        return web.json_response(
            {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": GROUP_VERSION,
                "resources": [
                    {
                        "name": name,
                        "singularName": "",
                        "namespaced": True,
                        "kind": "ExternalMetricValueList",
                        "verbs": ["get"],
                    }
                    for name in _METRICS
                ],
            }
        )

    async def metric(request: web.Request) -> web.Response:
        name = request.match_info["metric"]
        if name not in _METRICS:
            known = ", ".join(_METRICS)
            return _status(404, "NotFound", f"no metric {name}; there are {known}")
        service = _selected(unquote(request.query.get("labelSelector", "")))
        if service is None:
            return _status(400, "BadRequest", f"select one service, by {LABEL_SERVICE}=<name>")
        key = f"{request.match_info['namespace']}/{service}"
        found = _value(loads, key, name)
        now = datetime.fromtimestamp(int(wall()), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        item = {
            "metricName": name,
            "metricLabels": {LABEL_SERVICE: service},
            "timestamp": now,
            "value": quantity(found or 0.0),
        }
        return web.json_response(
            {
                "kind": "ExternalMetricValueList",
                "apiVersion": GROUP_VERSION,
                "metadata": {},
                # Without an item the autoscaler knows that nothing is known.
                "items": [item] if found is not None else [],
            }
        )

    app = web.Application(middlewares=[guard])
    app.router.add_get(_PREFIX, discovery)
    app.router.add_get(f"{_PREFIX}/namespaces/{{namespace}}/{{metric}}", metric)
    return app


class ExternalMetricsServer:
    """The API behind TLS, from when certificates and trust are known; both are read again."""

    def __init__(
        self,
        api: Api,
        loads: Loads,
        *,
        host: str,
        port: int,
        files: ServingFiles,
        wall: Callable[[], float],
    ) -> None:
        self._api = api
        self._host, self._port = host, port
        self._files = files
        self._trust: Trust | None = None
        self._app = application(loads, lambda: self._trust, wall)

    async def run(self) -> None:
        """Serves for ever; begins again where the trust or the certificate changed."""
        said = ""
        while True:
            try:
                trust = await read_trust(self._api)
                written = self._files.written()
                why = "" if trust else "the API server has no aggregation layer"
            except (ApiError, OSError, ValueError) as error:
                trust, why = None, str(error)
            if trust is None:
                if why != said:
                    log.warning("external metrics are not served: %s", why)
                said = why
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            said = ""
            try:
                async with self._served(trust):
                    await self._until_changed(trust, written)
            except (OSError, ssl.SSLError) as error:
                log.warning("external metrics are not served: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _until_changed(self, trust: Trust, written: tuple[float, float]) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            with suppress(ApiError, OSError, ValueError):  # what was read stands
                if await read_trust(self._api) != trust or self._files.written() != written:
                    return

    @asynccontextmanager
    async def _served(self, trust: Trust) -> AsyncIterator[None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._files.certificate, self._files.key)
        context.load_verify_locations(cadata=trust.authority)
        context.verify_mode = ssl.CERT_REQUIRED
        self._trust = trust
        runner = web.AppRunner(self._app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port, ssl_context=context).start()
            log.info("serving %s on port %d", GROUP_VERSION, self._port)
            yield
        finally:
            await runner.cleanup()


def _value(loads: Loads, key: str, name: str) -> float | None:
    service, load = loads.service(key), loads.load(key)
    if service is None or load is None:
        return None
    return values(service, load).get(name)


def _selected(selector: str) -> str | None:
    """The service that a label selector names; None for any other selector."""
    key, separator, value = selector.replace("==", "=").partition("=")
    if key.strip() != LABEL_SERVICE or not separator or "," in value or not value.strip():
        return None
    return value.strip()


def _status(code: int, reason: str, message: str) -> web.Response:
    document = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
    return web.json_response(document, status=code)
