"""Events: said once, counted when said again much later, and never in the way."""

import asyncio
from collections.abc import Mapping
from typing import Any

from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.events import EventPoster
from shoal.operator.kube.kinds import EVENTS, Kind
from shoal.operator.kube.news import Notice
from shoal.operator.kube.world import Key

CHAT = Key("default", "chat")
EVICTED = Notice("Evicted", "chat-0: disk", warning=True)


class Server:
    """Keeps events by name."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.away = False

    async def create(self, kind: Kind, document: Mapping[str, Any]) -> dict[str, Any]:
        assert kind is EVENTS
        if self.away:
            raise ApiError(0, "Unreachable", "away")
        name = document["metadata"]["name"]
        if name in self.events:
            raise ApiError(409, "AlreadyExists", name)
        self.events[name] = dict(document)
        return self.events[name]

    async def merge(
        self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]
    ) -> dict[str, Any]:
        if name not in self.events:
            raise ApiError(404, "NotFound", name)
        self.events[name] |= patch
        return self.events[name]


class Wall:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def poster(server: Server, wall: Wall) -> EventPoster:
    return EventPoster(server, "op", wall)  # type: ignore[arg-type]  # a fake


async def drain(events: EventPoster) -> None:
    task = asyncio.create_task(events.run())
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_the_same_words_are_posted_once() -> None:
    """However often a service is looked at; after some minutes their count goes up."""

    async def main() -> None:
        server, wall = Server(), Wall()
        events = poster(server, wall)
        for _ in range(5):
            events.say(CHAT, "u", EVICTED)
        await drain(events)
        (event,) = server.events.values()
        assert (event["count"], event["type"]) == (1, "Warning")
        assert event["involvedObject"]["uid"] == "u"
        wall.now += 301
        events.say(CHAT, "u", EVICTED)
        await drain(events)
        (event,) = server.events.values()
        assert event["count"] == 2

    asyncio.run(main())


def test_another_operator_does_not_repeat_it() -> None:
    """The name follows from the words, so what is there already is left as it is."""

    async def main() -> None:
        server, wall = Server(), Wall()
        for _ in range(2):
            events = poster(server, wall)
            events.say(CHAT, "u", EVICTED)
            await drain(events)
        (event,) = server.events.values()
        assert event["count"] == 1

    asyncio.run(main())


def test_a_namesake_has_events_of_its_own() -> None:
    """Events belong to the object, not to its name."""

    async def main() -> None:
        server = Server()
        events = poster(server, Wall())
        events.say(CHAT, "first", EVICTED)
        events.say(CHAT, "second", EVICTED)
        await drain(events)
        assert len(server.events) == 2

    asyncio.run(main())


def test_a_server_that_is_away_costs_the_event_alone() -> None:
    """The poster goes on with the next."""

    async def main() -> None:
        server = Server()
        events = poster(server, Wall())
        server.away = True
        events.say(CHAT, "u", EVICTED)
        await drain(events)
        server.away = False
        events.say(CHAT, "u", Notice("Ready", "serves"))
        await drain(events)
        assert [event["reason"] for event in server.events.values()] == ["Ready"]

    asyncio.run(main())
