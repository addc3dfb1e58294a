"""Route tables from Kubernetes: a list and a watch of the labelled ConfigMaps, for ever.

    list -> watch -> (its time is over) watch from where it stopped
                  -> (history is gone, the server went away) wait a little, list again

While the API server is away the router serves what it knows. Every request has a deadline and
the waits between them end at RETRY_SECONDS, so news arrive about a second after the server does.
"""

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import orjson

from shoal.api.routes import RouteTable
from shoal.router.kube_access import ServiceAccount
from shoal.router.kube_tables import SELECTOR, KubeTables

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
LIST_SECONDS = 30.0
WATCH_SECONDS = 60  # the server ends a watch after it, so a dead one is noticed
SILENCE_SECONDS = 75.0
RETRY_SECONDS = 1.0
_FIRST_RETRY_SECONDS = 0.2
_KEEPALIVE = (  # a server that vanished without a word is noticed after about 15 s
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 6),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_REPEAT_LOG_SECONDS = 60.0
_CLOSING_SECONDS = 0.5  # how often services that are gone are asked whether they have ended
_APPLY_SHARE = 0.2  # of the process's time, at most, goes into taking over tables


class WatchOver(Exception):
    """The watch cannot go on from where it is: everything has to be listed again."""


class KubeRoutes:
    """`on_change` gets all tables by service after every change, the first time once every
    namespace has been listed."""

    def __init__(
        self,
        account: ServiceAccount,
        on_change: Callable[[Mapping[str, RouteTable]], None],
        namespaces: Sequence[str] = (),
        *,
        busy: Callable[[str], bool] = lambda service: False,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`namespaces`: those to watch; none means the whole cluster. `busy`: whether a service
        has requests that have not ended."""
        self._account = account
        self._on_change = on_change
        self._busy = busy
        self._scopes: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._unlisted = set(self._scopes)
        self._tables = KubeTables()
        self._news = asyncio.Event()
        self._rng = rng or random.Random()
        self._clock = clock

    async def run(self) -> None:
        """Never returns."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._apply())
            for scope in self._scopes:
                group.create_task(self._follow(scope))

    async def _apply(self) -> None:
        """Hands on what is new. Many changes at once are one hand-over."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSING_SECONDS if self._tables.closing else None):
                    await self._news.wait()
            ended = self._tables.finish(self._busy)
            if not self._news.is_set() and not ended:
                continue
            self._news.clear()
            started = self._clock()
            self._on_change(self._tables.settled())
            await asyncio.sleep((self._clock() - started) / _APPLY_SHARE)

    async def _follow(self, scope: str | None) -> None:
        """One namespace, or the cluster, for ever."""
        problems = Problems(scope, self._clock)
        pause = _FIRST_RETRY_SECONDS
        while True:
            try:
                async with _session(self._account) as session:
                    version = await self._list(session, scope)
                    pause = _FIRST_RETRY_SECONDS
                    problems.over()
                    while True:
                        began = self._clock()
                        version = await self._watch(session, scope, version)
                        if self._clock() - began < RETRY_SECONDS:
                            await asyncio.sleep(RETRY_SECONDS)  # cut off: by a proxy, perhaps
            except WatchOver as over:
                log.info("route tables are listed again: %s", over)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                problems.met(error)
            await asyncio.sleep(pause * self._rng.uniform(0.7, 1.0))
            pause = min(RETRY_SECONDS, pause * 2)

    async def _list(self, session: aiohttp.ClientSession, scope: str | None) -> str:
        """Takes over what there is; returns the version to watch from."""
        async with asyncio.timeout(LIST_SECONDS):
            async with session.get(
                _path(scope), params={"labelSelector": SELECTOR}, headers=self._account.headers()
            ) as response:
                await _check(response)
                listed = orjson.loads(await response.read())
        changed = self._tables.replace(listed.get("items") or (), scope)
        first = bool(self._unlisted)
        self._unlisted.discard(scope)
        if changed or (first and not self._unlisted):
            self._tell()
        return str(listed["metadata"]["resourceVersion"])

    async def _watch(self, session: aiohttp.ClientSession, scope: str | None, version: str) -> str:
        """Follows changes until the server ends the watch; returns where it stopped."""
        params = {
            "labelSelector": SELECTOR,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        async with session.get(
            _path(scope), params=params, headers=self._account.headers(), timeout=limits
        ) as response:
            await _check(response)
            async for line in _lines(response):
                event = orjson.loads(line)
                kind, subject = event["type"], event["object"]
                if kind == "ERROR":
                    raise WatchOver(str(subject.get("message") or subject))
                version = subject["metadata"]["resourceVersion"]
                if kind == "DELETED":
                    changed = self._tables.drop(subject)
                else:
                    changed = kind != "BOOKMARK" and self._tables.put(subject)
                if changed:
                    self._tell()
        return version

    def _tell(self) -> None:
        if not self._unlisted:
            self._news.set()


class Problems:
    """Logs a trouble when it begins, every minute while it lasts, and its end."""

    def __init__(self, scope: str | None, clock: Callable[[], float]) -> None:
        self._where = "the cluster" if scope is None else f"namespace {scope}"
        self._clock = clock
        self._since: float | None = None
        self._told = ""
        self._told_at = 0.0

    def met(self, error: Exception) -> None:
        now = self._clock()
        words = str(error) or type(error).__name__
        if self._since is None:
            self._since = now
        elif words == self._told and now - self._told_at < _REPEAT_LOG_SECONDS:
            return
        self._told, self._told_at = words, now
        log.warning(
            "route tables of %s cannot be read, the known ones are served on: %s",
            self._where,
            words,
        )

    def over(self) -> None:
        if self._since is not None:
            seconds = self._clock() - self._since
            log.info("route tables of %s are read again after %.1f s", self._where, seconds)
            self._since = None


@asynccontextmanager
async def _session(account: ServiceAccount) -> AsyncIterator[aiohttp.ClientSession]:
    """Raises OSError."""
    connector = aiohttp.TCPConnector(ssl=account.trust(), socket_factory=_kept_alive)
    async with aiohttp.ClientSession(account.server, connector=connector) as session:
        yield session


def _kept_alive(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    for level, option, value in _KEEPALIVE:
        made.setsockopt(level, option, value)
    return made


def _path(scope: str | None) -> str:
    return "/api/v1/configmaps" if scope is None else f"/api/v1/namespaces/{scope}/configmaps"


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raises WatchOver for 410, OSError with the server's words for other refusals."""
    if response.status == 200:
        return
    try:
        told: Any = orjson.loads(await response.read())
        words = str(told["message"])
    except (ValueError, KeyError, TypeError):
        words = response.reason or ""
    if response.status == 410:
        raise WatchOver(words)
    hint = ""
    if response.status == 403:
        hint = "; the router's role needs get, list and watch of configmaps there"
    raise OSError(f"the API server says {response.status}: {words}{hint}")


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines of any length, as they come."""
    rest: list[bytes] = []
    async for piece in response.content.iter_any():
        *whole, last = piece.split(b"\n")
        if not whole:
            rest.append(last)
            continue
        yield b"".join(rest) + whole[0]
        for line in whole[1:]:
            yield line
        rest = [last]
