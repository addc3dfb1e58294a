"""Routers are asked for what they act on, by whoever leads."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from typing import Any

from shoal.operator.autoscale_load import RouterReport
from shoal.operator.kube.asking import RouterPace
from shoal.operator.kube.routers import RouterFleet, router_addresses
from shoal.operator.observe import EndpointView, RouterView

CHAT = "default/chat"


class Routers:
    """An API server that knows router pods, and the connections to them."""

    def __init__(self, *addresses: str) -> None:
        self.ready = dict.fromkeys(addresses, True)
        self.says: dict[str, dict[str, RouterView] | None] = {
            address: {CHAT: RouterView(7)} for address in addresses
        }
        self.asked: list[str] = []

    async def select(
        self, kind: object, namespace: str, selector: str
    ) -> AsyncIterator[tuple[list[dict[str, Any]], str]]:
        yield (
            [
                {
                    "status": {
                        "podIP": address,
                        "phase": "Running",
                        "conditions": [{"type": "Ready", "status": str(ready)}],
                    }
                }
                for address, ready in self.ready.items()
            ],
            "1",
        )

    def connect(self, address: str) -> "Connection":
        return Connection(self, address.rpartition(":")[0])


class Connection:
    """A connection that, like a real one, is of no use once it is closed."""

    def __init__(self, routers: Routers, address: str) -> None:
        self.routers, self.address, self.closed = routers, address, False

    async def views(
        self, within: float, service: str = "", scaled: Collection[str] = ()
    ) -> dict[str, RouterView] | None:
        assert not self.closed, "a closed connection was used"
        self.routers.asked.append(service)
        said = self.routers.says[self.address]
        return said and {name: view for name, view in said.items() if service in ("", name)}

    async def close(self) -> None:
        self.closed = True


class Told:
    """What the fleet tells."""

    def __init__(self) -> None:
        self.services: list[str] = []
        self.all = 0

    def tell_all(self) -> None:
        self.all += 1


def fleet_of(routers: Routers, told: Told, **pace: float) -> RouterFleet:
    fast = {"few": 0.01, "eager": 0.01, "idle": 0.02, "find": 0.01, "settle": 0.15, "silence": 0.1}
    return RouterFleet(
        partial(router_addresses, routers, "shoal", "a=b"),  # type: ignore[arg-type]  # a fake
        connect=routers.connect,
        clock=time.monotonic,
        changed=told.services.append,
        all_changed=told.tell_all,
        pace=RouterPace(**(fast | pace)),
    )


async def until(holds: Callable[[], bool], within: float = 5.0) -> None:
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(0.005)


def lead(fleet: RouterFleet, meanwhile: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        asked = asyncio.Event()
        task = asyncio.create_task(fleet.run(asked))
        try:
            await asyncio.wait_for(asked.wait(), 5)
            await meanwhile()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_who_leads_again_connects_anew() -> None:
    """Leadership that is lost and won again finds the routers as at the first time."""
    fleet = fleet_of(Routers("10.0.0.1"), Told())

    async def check() -> None:
        assert fleet.views(CHAT) == (RouterView(7),)

    lead(fleet, check)
    assert fleet.views(CHAT) == ()
    lead(fleet, check)


def test_a_router_that_does_not_know_a_service_acts_on_no_table() -> None:
    """It cannot have admitted anybody, and it has heard of no drain."""
    fleet = fleet_of(Routers("10.0.0.1"), Told())

    async def check() -> None:
        assert fleet.views("default/other") == (RouterView(0),)

    lead(fleet, check)


def test_a_new_router_counts_after_a_moment() -> None:
    """Until it has connected to all replicas, services would seem to be served less."""
    routers, told = Routers("10.0.0.1"), Told()
    fleet = fleet_of(routers, told)

    async def check() -> None:
        routers.says["10.0.0.2"] = {}
        routers.ready["10.0.0.2"] = False
        await asyncio.sleep(0.2)
        assert len(fleet.views(CHAT)) == 1, "it is not ready"
        routers.ready["10.0.0.2"] = True
        await asyncio.sleep(0.08)
        assert len(fleet.views(CHAT)) == 1, "it has just become ready"
        before = told.all
        await until(lambda: len(fleet.views(CHAT)) == 2)
        await until(lambda: told.all > before)

    lead(fleet, check)


def test_a_silent_router_is_left_out_and_taken_back() -> None:
    """A dead router holds nothing up; everybody is told when it ceases to count."""
    routers, told = Routers("10.0.0.1", "10.0.0.2"), Told()
    fleet = fleet_of(routers, told)

    async def check() -> None:
        assert len(fleet.views(CHAT)) == 2
        routers.says["10.0.0.2"] = None
        before = told.all
        await until(lambda: fleet.views(CHAT) == (RouterView(7),))
        await until(lambda: told.all > before)
        routers.says["10.0.0.2"] = {CHAT: RouterView(8)}
        await until(lambda: fleet.views(CHAT) == (RouterView(7), RouterView(8)))

    lead(fleet, check)


def test_a_pod_that_is_gone_is_left_out_at_once() -> None:
    """Its requests are gone with it."""
    routers = Routers("10.0.0.1", "10.0.0.2")
    fleet = fleet_of(routers, Told(), silence=60.0)

    async def check() -> None:
        del routers.ready["10.0.0.2"]
        await until(lambda: len(fleet.views(CHAT)) == 1)

    lead(fleet, check)


def test_requests_that_come_and_go_wake_nobody_at_rest() -> None:
    """An admission is news; a number of requests is while the service waits for routers."""
    routers, told = Routers("10.0.0.1"), Told()
    fleet = fleet_of(routers, told)

    def say(in_flight: int, *, admitted: bool = True) -> None:
        view = EndpointView("10.1.0.1:9000", admitted, in_flight)
        routers.says["10.0.0.1"] = {CHAT: RouterView(7, {"p": view})}

    async def check() -> None:
        say(0)
        await until(lambda: "p" in fleet.views(CHAT)[0].endpoints)
        told.services.clear()
        say(5)
        await until(lambda: fleet.views(CHAT)[0].endpoints["p"].in_flight == 5)
        assert told.services == []
        fleet.under_way(CHAT, True)
        say(0)
        await until(lambda: told.services == [CHAT])
        fleet.under_way(CHAT, False)
        say(0, admitted=False)
        await until(lambda: len(told.services) == 2)

    lead(fleet, check)


def test_few_services_under_way_are_asked_about_alone() -> None:
    """With a thousand services an answer about all is large."""
    routers = Routers("10.0.0.1")
    routers.says["10.0.0.1"] = {CHAT: RouterView(7), "default/other": RouterView(3)}
    fleet = fleet_of(routers, Told(), idle=30.0)

    async def check() -> None:
        assert set(routers.asked) == {""}
        fleet.under_way(CHAT, True)
        await until(lambda: routers.asked.count(CHAT) > 3)
        assert routers.asked.count("") == 1
        assert fleet.views("default/other") == (RouterView(3),)

    lead(fleet, check)


def test_a_first_request_that_waits_is_news_where_load_decides() -> None:
    """A service at zero wakes at once; more requests, or those of other services, wake nobody."""
    routers, told = Routers("10.0.0.1"), Told()
    fleet = fleet_of(routers, told, idle=30.0, scaled=0.02)

    def say(queued: int) -> None:
        report = RouterReport(0.0, queued)
        views = {name: RouterView(7, report=report) for name in (CHAT, "default/other")}
        routers.says["10.0.0.1"] = dict(views)

    def heard(queued: int) -> bool:
        report = fleet.views(CHAT)[0].report
        return report is not None and report.queued == queued

    async def check() -> None:
        fleet.scales(CHAT, True)
        fleet.under_way(CHAT, True)  # which ends the long pause that has begun
        await until(lambda: routers.asked.count(CHAT) > 0)
        fleet.under_way(CHAT, False)
        say(0)
        await until(lambda: heard(0))
        told.services.clear()
        say(1)
        await until(lambda: heard(1))
        assert told.services == [CHAT]
        say(9)
        await until(lambda: heard(9))
        assert told.services == [CHAT]

    lead(fleet, check)


def test_a_ready_router_that_does_not_answer_is_counted_as_silent() -> None:
    """It may hold requests; one whose pod is not ready any more takes none."""
    routers = Routers("10.0.0.1", "10.0.0.2")
    fleet = fleet_of(routers, Told())

    async def check() -> None:
        await until(lambda: len(fleet.views(CHAT)) == 2)
        assert fleet.silent() == 0
        routers.says["10.0.0.2"] = None
        await until(lambda: fleet.silent() == 1)
        routers.ready["10.0.0.2"] = False
        await until(lambda: fleet.silent() == 0)
        assert len(fleet.views(CHAT)) == 1

    lead(fleet, check)
