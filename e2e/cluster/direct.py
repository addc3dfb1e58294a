"""The API server over connections of one's own, for requests by the thousand.

kubectl and its proxy cost more processor time than the answers they fetch, on the same cores.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from e2e.cluster.kube import Object
from e2e.cluster.layout import ClusterError
from shoal.api.names import MANAGER
from shoal.operator.kube.access import load_access

_CONNECTIONS: Final = 32
_SECONDS: Final = 60.0
_READ_SIZE: Final = 1 << 20


class DirectApi:
    """JSON in, JSON out. ClusterError for an answer that is no success."""

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session = session
        self._server = server

    async def text(self, path: str) -> str:
        return (await self._call("GET", path, None, "", {})).decode()

    async def get(self, path: str, **parameters: str) -> Object:
        found: Object = orjson.loads(await self._call("GET", path, None, "", parameters))
        return found

    async def create(self, path: str, thing: Object) -> Object:
        """As `kubectl create` asks: a field that the type does not have is an error."""
        strict = {"fieldValidation": "Strict"}
        made: Object = orjson.loads(
            await self._call("POST", path, thing, "application/json", strict)
        )
        return made

    async def apply(self, path: str, thing: Object) -> Object:
        """Server-side apply, as the operator asks."""
        ours = {"fieldManager": MANAGER, "force": "true"}
        kind = "application/apply-patch+yaml"
        found: Object = orjson.loads(await self._call("PATCH", path, thing, kind, ours))
        return found

    async def merge(self, path: str, patch: Object) -> Object:
        kind = "application/merge-patch+json"
        found: Object = orjson.loads(await self._call("PATCH", path, patch, kind, {}))
        return found

    async def count(self, path: str) -> int:
        """Objects of a collection, of which just one is sent."""
        found = await self.get(path, limit="1")
        return len(found["items"]) + int(found["metadata"].get("remainingItemCount") or 0)

    async def watch(self, path: str, **parameters: str) -> AsyncGenerator[tuple[str, Object], None]:
        """What is there, then what happens until the stream ends: kinds of events and objects."""
        url, query = self._server + path, {"watch": "1", **parameters}
        endless = aiohttp.ClientTimeout(total=None)
        rest = b""
        async with self._session.get(
            url, params=query, timeout=endless, read_bufsize=_READ_SIZE
        ) as response:
            async for piece in response.content.iter_any():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    event: dict[str, Any] = orjson.loads(line)
                    yield event["type"], event["object"]

    async def _call(
        self, method: str, path: str, thing: Object | None, kind: str, query: dict[str, str]
    ) -> bytes:
        body = None if thing is None else orjson.dumps(thing)
        headers = {"Content-Type": kind} if kind else {}
        async with self._session.request(
            method, self._server + path, data=body, params=query, headers=headers
        ) as response:
            answer = await response.read()
            if response.status >= 300:
                words = answer[:500].decode(errors="replace")
                raise ClusterError(f"{method} {path}: {response.status} {words}")
            return answer


@asynccontextmanager
async def open_direct(kubeconfig: Path) -> AsyncIterator[DirectApi]:
    """Calls as the kubeconfig's user, by its token or certificate."""
    access = load_access({}, time.monotonic, kubeconfig=kubeconfig)
    token = access.token.value()
    headers = {"Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connector = aiohttp.TCPConnector(ssl=access.ssl_context(), limit=_CONNECTIONS)
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout
    ) as session:
        yield DirectApi(session, access.server)
