"""An API server that knows ConfigMaps: list, watch with bookmarks, history that is forgotten."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

from shoal.api.names import LABEL_ROUTES, ROUTES_KEY
from shoal.router.kube_access import ServiceAccount

Object = dict[str, Any]


def config_map(namespace: str, service: str, /, **fields: Any) -> Object:
    """The routes of `namespace/service`; `fields` are of the table."""
    table = {"service": f"{namespace}/{service}", "models": [service], **fields}
    return {
        "metadata": {
            "namespace": namespace,
            "name": f"{service}-routes",
            "labels": {LABEL_ROUTES: "true"},
        },
        "data": {ROUTES_KEY: json.dumps(table)},
    }


class KubeServer:
    """`async with KubeServer(folder) as server:`; `server.account` reaches it over TLS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.token = "first"
        self.refusals: list[tuple[int, str]] = []  # answered next, in order
        self.requests: list[dict[str, str]] = []
        self.version = 100
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[tuple[int, str, Object]] = []
        self._oldest = 0
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def __aenter__(self) -> "KubeServer":
        self.folder.mkdir(exist_ok=True)
        (self.folder / "token").write_text(self.token + "\n")
        self.authority.cert_pem.write_to_path(self.folder / "ca.crt")
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    @property
    def account(self) -> ServiceAccount:
        return ServiceAccount(f"https://127.0.0.1:{self._port}", self.folder)

    async def start(self) -> None:
        """Listens, on the port it had before."""
        import ssl

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        app = web.Application()
        app.router.add_get("/api/v1/configmaps", self._answer)
        app.router.add_get("/api/v1/namespaces/{namespace}/configmaps", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=context)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Goes away, connections and all."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def put(self, subject: Object) -> None:
        key = (subject["metadata"]["namespace"], subject["metadata"]["name"])
        self._record("MODIFIED" if key in self._objects else "ADDED", key, subject)

    def delete(self, namespace: str, service: str) -> None:
        key = (namespace, f"{service}-routes")
        self._record("DELETED", key, self._objects[key])

    def forget(self) -> None:
        """As after compaction: watches from before are answered with 410."""
        self._oldest = self.version
        self._history.clear()

    def _record(self, kind: str, key: tuple[str, str], subject: Object) -> None:
        self.version += 1
        metadata = {**subject["metadata"], "resourceVersion": str(self.version)}
        subject = {**subject, "metadata": metadata}
        if kind == "DELETED":
            del self._objects[key]
        else:
            self._objects[key] = subject
        self._history.append((self.version, kind, subject))
        self._changed.set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.query))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if self.refusals:
            return _status(*self.refusals.pop(0))
        assert request.query["labelSelector"] == f"{LABEL_ROUTES}=true"
        namespace = request.match_info.get("namespace")

        def inside(subject: Object) -> bool:
            return namespace in (None, subject["metadata"]["namespace"])

        if "watch" in request.query:
            return await self._watch(request, inside)
        items = [subject for subject in self._objects.values() if inside(subject)]
        return web.json_response(
            {"metadata": {"resourceVersion": str(self.version)}, "items": items}
        )

    async def _watch(
        self, request: web.Request, inside: Callable[[Object], bool]
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        seen = int(request.query["resourceVersion"])
        while True:
            self._changed.clear()
            if seen < self._oldest:
                gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
                await _event(response, "ERROR", gone)
                return response
            for version, kind, subject in list(self._history):
                if version > seen and inside(subject):
                    await _event(response, kind, subject)
            if self.version > seen:
                seen = self.version
                await _event(response, "BOOKMARK", {"metadata": {"resourceVersion": str(seen)}})
            await self._changed.wait()


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


async def _event(response: web.StreamResponse, kind: str, subject: Object) -> None:
    """In two pieces, as a network may cut it."""
    line = json.dumps({"type": kind, "object": subject}).encode() + b"\n"
    await response.write(line[:17])
    await asyncio.sleep(0)
    await response.write(line[17:])
