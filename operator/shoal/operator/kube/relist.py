"""Lists that find what watches lose: one of kopf's that begins anew does not tell what was
deleted, and where the operator's own (`streams`) begin.

A list of metadata alone is cheap for both sides; objects of which it shows a newer version are
read one by one, or all at once where they are many, as in the beginning.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Final

from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.kinds import LISTED, NODES, STREAMED, Kind
from shoal.operator.kube.world import Key, Objects, World, version_number, version_of

log: Final = logging.getLogger(__name__)

_ONE_BY_ONE: Final = 20
_EVERY_SECONDS: Final = 60.0
_SOON_SECONDS: Final = 2.0  # streams are interrupted together
_FRESH_SECONDS: Final = 2.0
_FIRST_STREAMS_SECONDS: Final = 15.0
_RETRY_SECONDS: Final = 1.0


class Relister:
    """Brings the world up to date."""

    def __init__(
        self,
        api: Api,
        world: World,
        namespaces: Sequence[str],
        feed: Feed,
        optional: Collection[Kind],
    ) -> None:
        """`namespaces` bounds what is listed; () is the whole cluster, with its nodes. `optional`:
        kinds that the cluster need not know."""
        self._api = api
        self._world = world
        self._scopes: Sequence[str | None] = tuple(namespaces) or (None,)
        self._feed = feed
        self._optional = tuple(optional)
        self._known: frozenset[Kind] = frozenset()
        self._versions: dict[tuple[Kind, str | None], int] = {}

    def knows(self, kind: Kind) -> bool:
        """Whether the cluster knew an optional kind at the last list."""
        return kind in self._known

    def version(self, kind: Kind, scope: str | None) -> int:
        """The version of the last list of a kind in a namespace; None is the whole cluster."""
        return self._versions[kind, scope]

    async def run_once(self, *, streamed: bool = True) -> None:
        """Lists every kind once. ApiError where the API server does not answer.

        Kinds that the operator's own watches tell everything about are listed where `streamed`.
        """
        # One kind after the other: all at once need several times the memory.
        for kind in LISTED:
            if streamed or kind not in STREAMED:
                await self._relist(kind)
        if self._scopes == (None,):
            await self._relist_nodes()
        self._known = frozenset(
            [kind for kind in self._optional if await self._relist_optional(kind)]
        )

    async def _relist_optional(self, kind: Kind) -> bool:
        """Whether it is there: where one cannot be had, everything else goes on."""
        try:
            if not await self._api.serves(kind):
                return False
            await self._relist(kind)
        except ApiError as error:
            log.warning("%s are left out: %s", kind.plural, error)
            return False
        return True

    async def _relist(self, kind: Kind) -> None:
        objects = self._world[kind]
        for scope in self._scopes:
            if not len(objects):
                version = await self._read_all(objects, scope)
            else:
                version = await self._compare(objects, scope)
            objects.forget_deaths(version)
            self._versions[objects.kind, scope] = version

    async def _read_all(self, objects: Objects, scope: str | None) -> int:
        """Reads every object; returns the version of the list."""
        version = 0
        async for items, text in self._api.pages(objects.kind, scope):
            version = version or version_number(text)
            for live in items:
                self._feed.saw(objects.kind, live)
        return version

    async def _compare(self, objects: Objects, scope: str | None) -> int:
        """Finds what is missing and what is newer; returns the version of the list."""
        listed: dict[Key, int] = {}
        version = 0
        pages = self._api.pages(objects.kind, scope, metadata_only=True)
        async for items, text in pages:
            version = version or version_number(text)
            for item in items:
                meta = item["metadata"]
                listed[Key(meta["namespace"], meta["name"])] = version_of(item)
        for key in objects.missing_from(listed, version, scope):
            log.info("%s %s is gone unseen", objects.kind.kind, key)
            self._feed.lost_key(objects.kind, key, version)
        outdated = objects.outdated_by(listed)
        if len(outdated) > _ONE_BY_ONE:
            await self._read_all(objects, scope)
        else:
            for key in outdated:
                await self._read_one(objects, key)
        return version

    async def _read_one(self, objects: Objects, key: Key) -> None:
        try:
            self._feed.saw(objects.kind, await self._api.get(objects.kind, *key))
        except ApiError as error:
            if not error.not_found:
                raise

    async def _relist_nodes(self) -> None:
        known = set(self._world.nodes)
        async for items, _ in self._api.pages(NODES, None):
            for node in items:
                name = node["metadata"]["name"]
                known.discard(name)
                self._feed.saw_node(node)
        for name in known:
            self._feed.lost_node(name)


class ListKeeper:
    """Lists everything at the start and when asked to, and every minute, and soon after kopf's
    stream began anew, what the operator does not watch itself."""

    def __init__(self, relister: Relister, clock: Callable[[], float]) -> None:
        self._relister = relister
        self._clock = clock
        self._first: float | None = None  # when the first list was in
        self._began = float("-inf")  # when the last one of everything that was completed did
        self._wanted = asyncio.Event()
        self._urgent = asyncio.Event()
        self._done = asyncio.Event()

    @property
    def any(self) -> bool:
        """Whether the first list is in."""
        return self._first is not None

    def request(self) -> None:
        """A stream begins with a list of its own. The first ones do so right after ours, later
        ones were interrupted: what was deleted meanwhile they do not tell."""
        if self._first is not None and self._clock() - self._first > _FIRST_STREAMS_SECONDS:
            self._wanted.set()

    async def first(self) -> None:
        """Waits for the first list."""
        while self._first is None:
            await self._done.wait()

    async def fresh(self) -> None:
        """Waits for a list that is begun from here on; the first one, if just in, will do."""
        await self.first()
        now = self._clock()
        assert self._first is not None, "it was waited for"
        oldest = self._began if now - self._first < _FRESH_SECONDS else now
        while self._began < oldest:
            self._done.clear()
            self._wanted.set()
            self._urgent.set()
            await self._done.wait()

    async def run(self) -> None:
        while True:
            everything = self._first is None or self._urgent.is_set()
            self._wanted.clear()
            self._urgent.clear()
            began = self._clock()
            await self._until_done(everything)
            if everything:
                self._began = began
            if self._first is None:
                self._first = self._clock()
                # What is here now lives long; the collector need not walk it again and again.
                gc.collect()
                gc.freeze()
            self._done.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _EVERY_SECONDS)
                await asyncio.wait_for(self._urgent.wait(), _SOON_SECONDS)

    async def _until_done(self, everything: bool) -> None:
        while True:
            try:
                await self._relister.run_once(streamed=everything)
                return
            except ApiError as error:
                log.warning("objects cannot be listed: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
