"""A small client of the API server: JSON in, JSON out, every call with a deadline.

Typed clients cost more processor time than everything else an operator does, so objects stay
plain mappings. Calls are counted by verb and code. Writes pass a guard first: who does not lead
does not write.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import aiohttp
import orjson

from shoal.api.names import MANAGER
from shoal.operator.kube.access import Access
from shoal.operator.kube.errors import ApiError, NotLeading
from shoal.operator.kube.kinds import Kind

CALL_SECONDS: Final = 10.0
PAGE: Final = 100  # objects: many small answers leave less behind than one large
_METADATA_PAGE: Final = 250
_CONNECTIONS: Final = 32
_DEAF: Final = 90.0  # seconds
_WRITES: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_APPLY: Final = {"fieldManager": MANAGER, "force": "true"}
_CREATE: Final = {"fieldManager": MANAGER, "fieldValidation": "Strict"}

Json = dict[str, Any]


class Api:
    """Calls to one API server. Use as an async context manager.

    ApiError is raised for every answer that is no success, and with status 0 where none came
    within the deadline. `may_write` is asked right before each write that names no lease.
    `count(verb, code)` hears of every call.
    """

    def __init__(
        self,
        access: Access,
        *,
        may_write: Callable[[], bool],
        count: Callable[[str, int], None],
    ) -> None:
        self._access = access
        self._may_write = may_write
        self._count = count
        self._session: aiohttp.ClientSession | None = None
        self._streams: aiohttp.ClientSession | None = None  # one connection a watch

    async def __aenter__(self) -> Self:
        self._session = self._connect(_CONNECTIONS)
        self._streams = self._connect(0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for session in (self._session, self._streams):
            if session is not None:
                await session.close()

    def _connect(self, connections: int) -> aiohttp.ClientSession:
        """For so many connections at the same time; 0: any number."""
        connector = aiohttp.TCPConnector(
            limit=connections, ssl=self._access.ssl_context(), keepalive_timeout=60
        )
        # Within a cluster bytes are cheaper than their compression, for both sides.
        return aiohttp.ClientSession(connector=connector, headers={"Accept-Encoding": "identity"})

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Json:
        return await self._json("GET", kind.path(namespace, name))

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server knows this kind."""
        try:
            answer = await self._json("GET", kind.path().rpartition("/")[0])
        except ApiError as error:
            if error.not_found:
                return False
            raise
        return any(found["name"] == kind.plural for found in answer.get("resources") or ())

    async def pages(
        self, kind: Kind, namespace: str | None, *, metadata_only: bool = False
    ) -> AsyncIterator[tuple[list[Json], str]]:
        """All objects of a kind that match its selector, with the list's resource version.

        With `metadata_only` objects have nothing but their metadata.
        """
        async for items, version in self.select(
            kind, namespace, kind.selector, metadata_only=metadata_only
        ):
            yield items, version

    async def select(
        self,
        kind: Kind,
        namespace: str | None,
        selector: str | None,
        *,
        metadata_only: bool = False,
    ) -> AsyncIterator[tuple[list[Json], str]]:
        """As `pages`, for any label selector."""
        query = {"limit": str(_METADATA_PAGE if metadata_only else PAGE)}
        if selector is not None:
            query["labelSelector"] = selector
        headers = {"Accept": _METADATA_LIST} if metadata_only else {}
        while True:
            answer = await self._json("GET", kind.path(namespace), query=query, headers=headers)
            items = answer.get("items") or []
            if not metadata_only:
                for item in items:  # a list's items leave these to the list
                    item.setdefault("apiVersion", kind.api_version)
                    item.setdefault("kind", kind.kind)
            meta = answer.get("metadata") or {}
            yield items, meta.get("resourceVersion", "")
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]

    async def watch(
        self, kind: Kind, namespace: str | None, version: int, seconds: float
    ) -> AsyncIterator[Json]:
        """What happens after `version` to objects of a kind that match its selector, as events of
        the API server, bookmarks among them; ends after about `seconds`, or where the connection
        does."""
        query = {
            "watch": "1",
            "resourceVersion": str(version),
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(round(seconds)),
        }
        if kind.selector is not None:
            query["labelSelector"] = kind.selector
        # Without even a bookmark for so long, the connection counts as dead.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CALL_SECONDS, sock_read=_DEAF)
        path = kind.path(namespace)
        rest = b""
        try:
            async with self._open(self._streams, "GET", path, None, query, {}, limits) as response:
                async for piece in response.content.iter_any():
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        yield _decoded(line, "GET", path)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable("GET", path, error) from None

    async def create(self, kind: Kind, document: Mapping[str, Any]) -> Json:
        """Makes an object; an unknown field is an error, not dropped."""
        namespace = document["metadata"]["namespace"]
        return await self._json("POST", kind.path(namespace), document, query=_CREATE)

    async def apply(
        self, kind: Kind, document: Mapping[str, Any], subresource: str | None = None
    ) -> Json:
        """Server-side apply: the operator owns what the document says, and takes it by force."""
        meta = document["metadata"]
        return await self._json(
            "PATCH",
            kind.path(meta["namespace"], meta["name"], subresource),
            document,
            query=_APPLY,
            headers={"Content-Type": "application/apply-patch+yaml"},
        )

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Json:
        """Merge patch: null takes a field away. A `metadata.uid` in it is a precondition."""
        return await self._json(
            "PATCH",
            kind.path(namespace, name),
            patch,
            query={"fieldManager": MANAGER},
            headers={"Content-Type": "application/merge-patch+json"},
        )

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None
    ) -> Json:
        """Asks for an object's end; only that of `uid`, whoever has the name by now."""
        options: Json = {"preconditions": {"uid": uid}}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._json("DELETE", kind.path(namespace, name), options)

    async def replace_lease(
        self, path: str, document: Mapping[str, Any], *, new: bool, within: float
    ) -> Json:
        """Writes a Lease, leading or not; `path` is the collection where it is `new`."""
        return await self._json(
            "POST" if new else "PUT", path, document, within=within, guarded=False
        )

    async def read(self, path: str, within: float) -> Json:
        return await self._json("GET", path, within=within)

    async def log_tail(self, namespace: str, pod: str, container: str) -> str:
        """The last line that a container wrote."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        query = {"container": container, "tailLines": "1", "limitBytes": "4096"}
        body = await self._call("GET", path, None, query, {}, CALL_SECONDS, guarded=True)
        return body.decode("utf-8", errors="replace").strip()

    async def _json(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        within: float = CALL_SECONDS,
        guarded: bool = True,
    ) -> Json:
        sent = dict(headers or {})
        body = None
        if document is not None:
            body = orjson.dumps(document)
            sent.setdefault("Content-Type", "application/json")
        answer = await self._call(method, path, body, query or {}, sent, within, guarded=guarded)
        return _decoded(answer, method, path)

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        query: Mapping[str, str],
        headers: dict[str, str],
        within: float,
        *,
        guarded: bool,
    ) -> bytes:
        if guarded and method in _WRITES and not self._may_write():
            raise NotLeading
        limits = aiohttp.ClientTimeout(total=within)
        try:
            async with self._open(
                self._session, method, path, body, query, headers, limits
            ) as response:
                return await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(method, path, error) from None

    @asynccontextmanager
    async def _open(
        self,
        session: aiohttp.ClientSession | None,
        method: str,
        path: str,
        body: bytes | None,
        query: Mapping[str, str],
        headers: dict[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful answer, its body to be read; ApiError for any other."""
        assert session is not None, "the client was not entered"
        code = 0
        try:
            for attempt in range(2):
                # A token that was just replaced on disk is refused once, under its old value.
                if token := self._access.token.value(fresh=attempt > 0):
                    headers["Authorization"] = f"Bearer {token}"
                async with session.request(
                    method,
                    self._access.server + path,
                    data=body,
                    params=query,
                    headers=headers,
                    timeout=limits,
                ) as response:
                    code = response.status
                    if code < 300:
                        yield response
                        return
                    answer = await response.read()
                    if code != 401 or attempt > 0:
                        raise _error(code, answer, response.headers.get("Retry-After"))
            raise AssertionError("the second attempt returns or raises")
        finally:
            self._count(method, code)


def _unreachable(method: str, path: str, error: Exception) -> ApiError:
    said = str(error) or type(error).__name__
    return ApiError(0, "Unreachable", f"{method} {path}: {said}")


def _decoded(text: bytes, method: str, path: str) -> Json:
    try:
        found: Json = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ApiError(0, "Unreadable", f"{method} {path}: {error}") from None
    return found


def _error(code: int, body: bytes, retry_after: str | None) -> ApiError:
    pause = float(retry_after) if retry_after and retry_after.isdigit() else None
    try:
        status = orjson.loads(body)
        return ApiError(code, status.get("reason") or "", status.get("message") or "", pause)
    except (orjson.JSONDecodeError, AttributeError):
        return ApiError(code, "", body[:200].decode("utf-8", errors="replace"), pause)
