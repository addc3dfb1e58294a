"""What the routers say: which tables they act on, whom they have admitted, what is in flight.

Each router pod is asked by itself, never twice at the same time; `asking` says what and when. A
pod that is gone is left out at once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from shoal.api.names import PORT_ROUTER_GRPC
from shoal.operator.kube.asking import PACE, Hearing, Interest, Question, RouterPace, Views, news
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import PODS
from shoal.operator.observe import RouterView

log: Final = logging.getLogger(__name__)

_ENDED: Final = ("Failed", "Succeeded")


class RouterCalls(Protocol):
    """A connection to one router."""

    async def views(
        self, within: float, service: str = "", scaled: Collection[str] = ()
    ) -> Views | None: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Router:
    calls: RouterCalls
    hearing: Hearing = field(default_factory=Hearing)
    asking: asyncio.Task[None] | None = None


class RouterFleet:
    """The routers of an installation."""

    def __init__(
        self,
        find: Callable[[], Awaitable[Mapping[str, bool]]],
        *,
        connect: Callable[[str], RouterCalls],
        clock: Callable[[], float],
        changed: Callable[[str], None],
        all_changed: Callable[[], None],
        pace: RouterPace = PACE,
    ) -> None:
        """`find` lists the routers' addresses, each with whether it is ready (ApiError). `changed`
        hears of each service whose views differ from before, and `all_changed` when a router
        began or ceased to count."""
        self._list = find
        self._connect = connect
        self._clock = clock
        self._changed = changed
        self._all_changed = all_changed
        self._pace = pace
        self._routers: dict[str, _Router] = {}  # by address
        self._counted: frozenset[str] = frozenset()  # addresses
        self._interest = Interest()
        self._hurry = asyncio.Event()
        self._found_at: float | None = None

    def views(self, service: str) -> tuple[RouterView, ...]:
        """One a router that answers; a router that does not know the service acts on no table."""
        return tuple(
            self._routers[address].hearing.views.get(service, RouterView(0))
            for address in sorted(self._counting())
        )

    def silent(self) -> int:
        """Routers that take requests but have not answered for a while."""
        now = self._clock()
        return sum(router.hearing.mute(now, self._pace) for router in self._routers.values())

    def scales(self, service: str, by_load: bool) -> None:
        """Whether the number of the service's replicas follows what routers say."""
        self._interest = self._interest.with_scaled(service, by_load)

    def under_way(self, service: str, busy: bool) -> None:
        """Whether the service waits for what routers say next."""
        before, self._interest = self._interest, self._interest.with_under_way(service, busy)
        if busy and self._interest != before:
            self._hurry.set()

    def rest(self) -> None:
        """Nothing is under way: this operator does not lead."""
        self._interest = Interest()

    async def run(self, asked_once: asyncio.Event) -> None:
        """Asks for ever; `asked_once` is set after the routers were found and asked once."""
        try:
            while True:
                self._hurry.clear()
                await self._round()
                if self._found_at is not None:
                    asked_once.set()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), self._interest.rest(self._pace))
                await asyncio.sleep(self._interest.step(self._pace))
        finally:
            # Whoever leads again connects anew.
            known, self._routers, self._counted = self._routers, {}, frozenset()
            self._found_at = None
            for router in known.values():
                await _close(router)

    async def _round(self) -> None:
        """Finds the routers and asks those that are not being asked; waits a little for them."""
        first, now = self._found_at is None, self._clock()
        if self._found_at is None or now - self._found_at >= self._pace.find:
            try:
                await self._find()
            except ApiError as error:
                log.warning("router pods cannot be listed: %s", error)
        for address, router in self._routers.items():
            if router.asking is None or router.asking.done():
                asked_all = router.hearing.asked_all
                question = self._interest.question(asked_all, self._clock(), self._pace)
                router.asking = asyncio.create_task(self._ask(address, router, question))
        asking = [r.asking for r in self._routers.values() if r.asking is not None]
        if asking:
            await asyncio.wait(asking, timeout=self._pace.answer if first else self._pace.few)
        counted = self._counting()
        if counted != self._counted:
            self._counted = counted
            self._all_changed()

    async def _find(self) -> None:
        now, ready = self._clock(), await self._list()
        for address in self._routers.keys() - ready.keys():
            await _close(self._routers.pop(address))
        # Those that are there when the fleet is first seen have had their moment.
        counts_from = now if self._found_at is None else now + self._pace.settle
        for address, is_ready in ready.items():
            if address not in self._routers:
                self._routers[address] = _Router(self._connect(address))
            router = self._routers[address]
            router.hearing = router.hearing.found(is_ready, counts_from)
        self._found_at = now

    async def _ask(self, address: str, router: _Router, question: Question) -> None:
        # Routers are asked for one service, or for all of them.
        for part in [Question((name,)) for name in question.services] or [question]:
            asked, service = self._clock(), "".join(part.services)
            said = await router.calls.views(self._pace.answer, service, self._interest.scaled)
            before = router.hearing
            if said is None:
                router.hearing = before.unheard(asked)
                if before.answered and before.silent_since is None:
                    log.warning("router %s does not answer", address)
                return
            router.hearing = before.heard(part, said, asked)
            for name in news(self._interest, part, before, router.hearing):
                self._changed(name)

    def _counting(self) -> frozenset[str]:
        now, routers = self._clock(), self._routers.items()
        return frozenset(a for a, router in routers if router.hearing.counts(now, self._pace))


async def _close(router: _Router) -> None:
    if router.asking is not None:
        router.asking.cancel()
    await router.calls.close()


async def router_addresses(api: Api, namespace: str, selector: str) -> dict[str, bool]:
    """The gRPC addresses of the router pods, each with whether its pod is ready. ApiError where
    they cannot be listed."""
    ready = {}
    async for pods, _ in api.select(PODS, namespace, selector):
        for pod in pods:
            status = pod.get("status") or {}
            if (ip := status.get("podIP")) and status.get("phase") not in _ENDED:
                host = f"[{ip}]" if ":" in ip else ip
                ready[f"{host}:{PORT_ROUTER_GRPC}"] = _is_ready(status)
    return ready


def _is_ready(status: Mapping[str, Any]) -> bool:
    conditions = status.get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
