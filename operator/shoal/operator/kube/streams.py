"""Watches of the operator's own children, each resumed where it ended.

kopf feeds services and nodes. What the operator makes for a service it watches itself: a thousand
services make ten thousand changes of pods, Services and ConfigMaps, most of them echoes of its own
writes, and kopf's work for each change (a task, a queue, copies, the search for handlers) is
many times that of noting it. A stream that breaks goes on after the last version it told, so it
loses nothing; where the API server has forgotten that version, a list tells what happened.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import Kind
from shoal.operator.kube.world import version_of

log: Final = logging.getLogger(__name__)

_SECONDS: Final = 300.0  # the API server ends a stream after that, or a little later
_PAUSES: Final = (0.1, 0.2, 0.5, 1.0)  # between attempts that fail; the last one again and again
_GONE: Final = 410


class WatchApi(Protocol):
    """The call that streams need."""

    def watch(
        self, kind: Kind, namespace: str | None, version: int, seconds: float
    ) -> AsyncIterator[dict[str, Any]]: ...


class Sink(Protocol):
    """Who takes note of events."""

    def saw(self, kind: Kind, live: dict[str, Any]) -> None: ...

    def lost(self, kind: Kind, gone: dict[str, Any]) -> None: ...

    def settled(self, kind: Kind, version: int) -> None:
        """Nothing older than that is still under way."""


class Streams:
    """One watch a kind and namespace."""

    def __init__(
        self,
        api: WatchApi,
        sink: Sink,
        kinds: Sequence[Kind],
        namespaces: Sequence[str],
        *,
        listed: Callable[[Kind, str | None], int],
        list_again: Callable[[], Awaitable[None]],
        jitter: Callable[[], float],
    ) -> None:
        """`listed(kind, namespace)` is the version of the last list, after which a stream begins;
        `list_again()` returns when a list begun after the call is in. () as namespaces is the
        whole cluster. `jitter` gives numbers in [0, 1)."""
        self._api = api
        self._sink = sink
        self._kinds = kinds
        self._scopes: Sequence[str | None] = tuple(namespaces) or (None,)
        self._listed = listed
        self._list_again = list_again
        self._jitter = jitter

    async def run(self) -> None:
        """Watches for ever; to be called when the first list is in."""
        async with asyncio.TaskGroup() as tasks:
            for kind in self._kinds:
                for scope in self._scopes:
                    tasks.create_task(self._follow(kind, scope), name=f"watch {kind.plural}")

    async def _follow(self, kind: Kind, scope: str | None) -> None:
        version, failures, bookmark = self._listed(kind, scope), 0, 0
        while True:
            began = version
            try:
                # Not all at the same moment: a stream that begins costs the server a little.
                seconds = _SECONDS * (1 + self._jitter() / 4)
                async for event in self._api.watch(kind, scope, version, seconds):
                    version = max(version, self._note(kind, event))
                    failures = 0
                    if event["type"] == "BOOKMARK":
                        # A minute ago: answers to writes of then are in.
                        self._sink.settled(kind, bookmark)
                        bookmark = version
            except ApiError as error:
                if error.status == _GONE:
                    log.info("%s: listed again: %s", kind.plural, error)
                    await self._list_again()
                    version = began = self._listed(kind, scope)
                elif failures == 1:
                    log.warning("%s cannot be watched: %s", kind.plural, error)
            if version == began:
                await asyncio.sleep(_PAUSES[min(failures, len(_PAUSES) - 1)])
                failures += 1

    def _note(self, kind: Kind, event: dict[str, Any]) -> int:
        """Passes an event on; returns the version that it tells."""
        live = event["object"]
        match event["type"]:
            case "ERROR":
                code = live.get("code") or 0
                raise ApiError(code, live.get("reason") or "", live.get("message") or "")
            case "DELETED":
                self._sink.lost(kind, live)
            case "ADDED" | "MODIFIED":
                self._sink.saw(kind, live)
        return version_of(live)
