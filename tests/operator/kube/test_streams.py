"""The operator's own watches: resumed where they ended, listed again where that is forgotten."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import PODS, SERVICES, Kind
from shoal.operator.kube.streams import Streams

Json = dict[str, Any]
Part = Json | Exception


def event(what: str, version: int, name: str = "p") -> Json:
    meta = {"namespace": "default", "name": name, "resourceVersion": str(version)}
    return {"type": what, "object": {"metadata": meta}}


def error(code: int) -> Json:
    return {"type": "ERROR", "object": {"code": code, "reason": "Expired", "message": "too old"}}


class Server:
    """Streams that were written down before; after the last one nothing happens any more."""

    def __init__(self, *streams: list[Part]) -> None:
        self.streams = list(streams)
        self.asked: list[tuple[Kind, str | None, int]] = []
        self.list_version = 10
        self.lists = 0
        self.told: list[tuple[str, int]] = []
        self.settled_at: list[int] = []
        self.idle = asyncio.Event()

    async def watch(
        self, kind: Kind, namespace: str | None, version: int, seconds: float
    ) -> AsyncIterator[Json]:
        self.asked.append((kind, namespace, version))
        if not self.streams:
            self.idle.set()
            await asyncio.Event().wait()
        for part in self.streams.pop(0):
            if isinstance(part, Exception):
                raise part
            yield part

    def saw(self, kind: Kind, live: Json) -> None:
        self.told.append(("saw", int(live["metadata"]["resourceVersion"])))

    def lost(self, kind: Kind, gone: Json) -> None:
        self.told.append(("lost", int(gone["metadata"]["resourceVersion"])))

    def settled(self, kind: Kind, version: int) -> None:
        self.settled_at.append(version)

    async def list_again(self) -> None:
        self.lists += 1
        self.list_version = 50


def run(
    server: Callable[[], Server],
    check: Callable[[Server], None],
    kinds: tuple[Kind, ...] = (PODS,),
    namespaces: tuple[str, ...] = (),
) -> None:
    """Watches until every stream was told, then checks."""

    async def main() -> None:
        found = server()
        streams = Streams(
            found,
            found,
            kinds,
            namespaces,
            listed=lambda kind, scope: found.list_version,
            list_again=found.list_again,
            jitter=lambda: 0.0,
        )
        task = asyncio.create_task(streams.run())
        try:
            await _either(found.idle.wait(), task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        check(found)

    asyncio.run(main())


async def _either(wanted: Awaitable[object], task: "asyncio.Task[None]") -> None:
    waiting = asyncio.ensure_future(wanted)
    await asyncio.wait([waiting, task], timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert waiting.done() and not task.done(), "the streams ended or never came to rest"


def test_a_stream_that_ends_goes_on_after_what_it_told_last() -> None:
    """Bookmarks count: they are told so that the next stream need not begin long ago."""

    def server() -> Server:
        return Server([event("ADDED", 11), event("BOOKMARK", 20)], [event("DELETED", 21)])

    def check(found: Server) -> None:
        assert [version for _, _, version in found.asked] == [10, 20, 21]
        assert found.told == [("saw", 11), ("lost", 21)]
        assert found.lists == 0

    run(server, check)


def test_a_connection_that_breaks_loses_nothing() -> None:
    """What was told before is not asked for again."""

    def server() -> Server:
        broken = ApiError(0, "Unreachable", "reset")
        return Server([event("MODIFIED", 12), broken], [broken], [event("MODIFIED", 13)])

    def check(found: Server) -> None:
        assert [version for _, _, version in found.asked] == [10, 12, 12, 13]
        assert found.told == [("saw", 12), ("saw", 13)]

    run(server, check)


def test_a_version_that_is_forgotten_is_listed_again() -> None:
    """However the server says so: as an event of the stream, or as its answer."""

    def server() -> Server:
        return Server([event("ADDED", 11), error(410)], [ApiError(410, "Expired", "too old")])

    def check(found: Server) -> None:
        assert [version for _, _, version in found.asked] == [10, 50, 50]
        assert found.lists == 2

    run(server, check)


def test_deaths_are_remembered_from_one_bookmark_to_the_next() -> None:
    """An answer that was under way at the first one may still come."""

    def server() -> Server:
        return Server([event("BOOKMARK", 20), event("DELETED", 25), event("BOOKMARK", 30)])

    def check(found: Server) -> None:
        assert found.settled_at == [0, 20]

    run(server, check)


def test_each_kind_and_namespace_has_its_own_stream() -> None:
    """An operator of some namespaces may not ask for the whole cluster."""

    def check(found: Server) -> None:
        assert {(kind, scope) for kind, scope, _ in found.asked} >= {
            (kind, scope) for kind in (PODS, SERVICES) for scope in ("a", "b")
        }

    run(Server, check, kinds=(PODS, SERVICES), namespaces=("a", "b"))
