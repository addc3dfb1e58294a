"""The one way into the world: what watches and lists say, and what the operator's writes return.

Whatever is news wakes the services that it concerns. The operator's own writes do not: who made
them goes on from there. A pod that starts changes several times within a moment, so what merely
goes on is looked at a little later, and all of it at once.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from shoal.operator.kube.book import ServiceBook
from shoal.operator.kube.kinds import DISRUPTION_BUDGETS, INFERENCE_SERVICES, PODS, Kind
from shoal.operator.kube.world import Key, World

Json = Mapping[str, Any]

_GOES_ON_SECONDS: Final = 0.2
_PLACED_SECONDS: Final = 1.0


class Feed:
    """Keeps world and book in step; `wake(service, delay)` hears of each service with news, and
    how many seconds a look at it may wait."""

    def __init__(self, world: World, book: ServiceBook, wake: Callable[[str, float], None]) -> None:
        self._world = world
        self._book = book
        self._wake = wake

    def saw(self, kind: Kind, live: Json) -> None:
        """A watch or a list shows an object as it is."""
        idle = kind is DISRUPTION_BUDGETS and self._same_spec(kind, live)
        service = self._world[kind].put(live)
        if service is None:
            return
        self._read(kind, service)
        if not idle:
            self._wake(service, _delay(kind, live))

    def lost(self, kind: Kind, gone: Json) -> None:
        """A watch or a list shows that an object is gone, as of its resource version."""
        service = self._world[kind].drop(gone)
        if service is not None:
            self._read(kind, service)
            self._wake(service, 0.0)

    def lost_key(self, kind: Kind, key: Key, version: int) -> None:
        """As `lost`, where only the name is known."""
        service = self._world[kind].drop_key(key, version)
        if service is not None:
            self._read(kind, service)
            self._wake(service, 0.0)

    def wrote(self, kind: Kind, live: Json) -> None:
        """The answer to a write of the operator's own."""
        if not self._world.keeps(kind):
            return
        service = self._world[kind].put(live)
        # Somebody may have changed the spec just before the status was written.
        if service is not None and self._read(kind, service):
            self._wake(service, 0.0)

    def ended(self, kind: Kind, live: Json) -> None:
        """An object that the operator deleted, or found to be gone."""
        service = self._world[kind].drop(live)
        if service is not None:
            self._read(kind, service)

    def settled(self, kind: Kind, version: int) -> None:
        """A watch told everything up to a version, and no answer that is older is under way."""
        self._world[kind].forget_deaths(version)

    def saw_node(self, node: Json) -> None:
        if self._world.put_node(node):
            self._wake_on(node["metadata"]["name"])

    def lost_node(self, name: str) -> None:
        if self._world.drop_node(name):
            self._wake_on(name)

    def _read(self, kind: Kind, service: str) -> bool:
        """Reads a service's document again; whether it is another one than before."""
        if kind is not INFERENCE_SERVICES:
            return False
        before = self._book.get(service)
        live = self._world[kind].get(*service.split("/", 1))
        for other in self._book.note(service, live):
            self._wake(other, 0.0)
        return self._book.get(service) is not before

    def _same_spec(self, kind: Kind, live: Json) -> bool:
        meta = live["metadata"]
        known = self._world[kind].get(meta["namespace"], meta["name"])
        return known is not None and (
            known["metadata"].get("generation") == meta.get("generation")
            and known["metadata"].get("labels") == meta.get("labels")
            and known["metadata"].get("ownerReferences") == meta.get("ownerReferences")
        )

    def _wake_on(self, node: str) -> None:
        for pod in self._world[PODS]:
            if (pod.get("spec") or {}).get("nodeName") == node:
                service = self._world[PODS].service_of(pod)
                if service is not None:
                    self._wake(service, 0.0)


def _delay(kind: Kind, live: Json) -> float:
    """Seconds that a look may wait: none for what a person asks for, and what begins to end."""
    if kind is INFERENCE_SERVICES or "deletionTimestamp" in live["metadata"]:
        return 0.0
    return _PLACED_SECONDS if kind is PODS and _just_placed(live) else _GOES_ON_SECONDS


def _just_placed(pod: Json) -> bool:
    """It has a node, which has not begun with it: it will say so in a moment."""
    status = pod.get("status") or {}
    begun = status.get("phase") != "Pending" or status.get("startTime")
    return "nodeName" in (pod.get("spec") or {}) and not begun
