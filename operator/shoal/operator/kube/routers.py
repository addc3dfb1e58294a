"""What the routers say: which tables they act on, whom they have admitted, what is in flight.

Each router pod is asked by itself, never twice at the same time: often while something is under
way, about those services alone where they are few, seldom else. A router that has not answered
for a while is left out, so that a dead one holds nothing up; a pod that is gone is left out at
once. One that has just come up counts after a moment: until it has connected to all replicas,
services would seem to be served less.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

from shoal.api.names import PORT_ROUTER_GRPC
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import PODS
from shoal.operator.observe import RouterView

log: Final = logging.getLogger(__name__)

_ENDED: Final = ("Failed", "Succeeded")
_FEW: Final = 4  # services that are asked about by name

Views = Mapping[str, RouterView]


class RouterCalls(Protocol):
    """A connection to one router."""

    async def views(
        self, within: float, service: str = "", scaled: Collection[str] = ()
    ) -> Views | None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RouterPace:
    """Seconds."""

    few: float = 0.25  # between two questions while few services are under way
    eager: float = 1.0  # while many are
    scaled: float = 2.0  # while any scales by its load
    idle: float = 5.0  # else
    find: float = 1.0  # between two lists of the router pods, at least
    settle: float = 3.0  # from ready until it counts
    answer: float = 3.0  # longest wait for one answer
    silence: float = 5.0  # without an answer for so long: left out


@dataclass(slots=True)
class _Router:
    calls: RouterCalls
    views: Views = field(default_factory=lambda: MappingProxyType({}))
    counts_from: float = float("inf")  # when it is ready, and has been for a moment
    ready: bool = False  # says its pod
    answered: bool = False  # at least once
    silent_since: float | None = None  # when it was first asked without an answer
    asking: asyncio.Task[None] | None = None


class RouterFleet:
    """The routers of an installation, found by label."""

    def __init__(
        self,
        api: Api,
        *,
        namespace: str,
        selector: str,
        connect: Callable[[str], RouterCalls],
        clock: Callable[[], float],
        changed: Callable[[str], None],
        all_changed: Callable[[], None],
        pace: RouterPace = RouterPace(),  # frozen
    ) -> None:
        """`changed(service)` hears of each service whose views differ from before, and
        `all_changed` when a router began or ceased to count."""
        self._api = api
        self._namespace = namespace
        self._selector = selector
        self._connect = connect
        self._clock = clock
        self._changed = changed
        self._all_changed = all_changed
        self._pace = pace
        self._routers: dict[str, _Router] = {}  # by address
        self._under_way: set[str] = set()
        self._scaled: set[str] = set()
        self._hurry = asyncio.Event()
        self._counted: frozenset[str] = frozenset()
        self._found_at: float | None = None
        self._asked_all_at = float("-inf")

    def views(self, service: str) -> tuple[RouterView, ...]:
        """One a router that answers; a router that does not know the service acts on no table."""
        return tuple(
            router.views.get(service, RouterView(0))
            for _, router in sorted(self._routers.items())
            if self._counts(router)
        )

    def silent(self) -> int:
        """Routers that take requests but have not answered for a while."""
        now = self._clock()
        return sum(
            router.ready and now >= router.counts_from and not self._counts(router)
            for router in self._routers.values()
        )

    def scales(self, service: str, by_load: bool) -> None:
        """Whether the number of the service's replicas follows what routers say."""
        if by_load:
            self._scaled.add(service)
        else:
            self._scaled.discard(service)

    def under_way(self, service: str, busy: bool) -> None:
        """Whether the service waits for what routers say next."""
        if not busy:
            self._under_way.discard(service)
        elif service not in self._under_way:
            self._under_way.add(service)
            self._hurry.set()

    def rest(self) -> None:
        """Nothing is under way: this operator does not lead."""
        self._under_way.clear()
        self._scaled.clear()

    async def run(self, asked_once: asyncio.Event) -> None:
        """Asks for ever; `asked_once` is set after each router was asked once."""
        try:
            while True:
                self._hurry.clear()
                await self._round()
                asked_once.set()
                if not self._under_way:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._hurry.wait(), self._all_seconds())
                # What has just begun is not known to routers yet.
                few = len(self._under_way) <= _FEW
                await asyncio.sleep(self._pace.few if few else self._pace.eager)
        finally:
            # Whoever leads again connects anew.
            known, self._routers, self._counted = self._routers, {}, frozenset()
            self._found_at, self._asked_all_at = None, float("-inf")
            for router in known.values():
                await self._close(router)

    async def _round(self) -> None:
        """Finds the routers and asks those that are not being asked; waits a little for them."""
        first = self._found_at is None
        if self._found_at is None or self._clock() - self._found_at >= self._pace.find:
            try:
                await self._find()
            except ApiError as error:
                log.warning("router pods cannot be listed: %s", error)
        services = self._question()
        for address, router in self._routers.items():
            if router.asking is None or router.asking.done():
                router.asking = asyncio.create_task(self._ask(address, router, services))
        asking = [r.asking for r in self._routers.values() if r.asking is not None]
        if asking:
            await asyncio.wait(asking, timeout=self._pace.answer if first else self._pace.few)
        counted = frozenset(a for a, router in self._routers.items() if self._counts(router))
        if counted != self._counted:
            self._counted = counted
            self._all_changed()

    def _all_seconds(self) -> float:
        """Between two questions about all services."""
        return self._pace.scaled if self._scaled else self._pace.idle

    def _question(self) -> tuple[str, ...]:
        """The services to ask about; "" is all."""
        now = self._clock()
        if 0 < len(self._under_way) <= _FEW and now - self._asked_all_at < self._all_seconds():
            return tuple(sorted(self._under_way))
        self._asked_all_at = now
        return ("",)

    async def _find(self) -> None:
        now = self._clock()
        ready = await router_addresses(self._api, self._namespace, self._selector)
        for address in self._routers.keys() - ready.keys():
            await self._close(self._routers.pop(address))
        # Those that are there when the fleet is first seen have had their moment.
        settle = 0.0 if self._found_at is None else self._pace.settle
        for address, is_ready in ready.items():
            if address not in self._routers:
                self._routers[address] = _Router(self._connect(address))
            router = self._routers[address]
            router.ready = is_ready
            if is_ready:
                router.counts_from = min(router.counts_from, now + settle)
        self._found_at = now

    async def _ask(self, address: str, router: _Router, services: tuple[str, ...]) -> None:
        for service in services:
            began = self._clock()
            said = await router.calls.views(self._pace.answer, service, self._scaled)
            if said is None:
                if router.silent_since is None:
                    router.silent_since = began
                    if router.answered:
                        log.warning("router %s does not answer", address)
                return
            router.answered, router.silent_since = True, None
            before = router.views
            others = {k: v for k, v in before.items() if k != service} if service else {}
            router.views = {**others, **said}
            for name in {service} if service else before.keys() | said.keys():
                if self._differs(name, before.get(name), said.get(name)):
                    self._changed(name)

    def _differs(self, service: str, before: RouterView | None, after: RouterView | None) -> bool:
        """Requests come and go all the time; their number matters while a pod drains, and a first
        one that waits while nobody serves."""
        if service in self._scaled and after is not None and _waits(after) and not _waits(before):
            return True
        if service in self._under_way or before is None or after is None:
            return before != after
        return before.generation != after.generation or {
            name: (view.address, view.admitted) for name, view in before.endpoints.items()
        } != {name: (view.address, view.admitted) for name, view in after.endpoints.items()}

    def _counts(self, router: _Router) -> bool:
        now, since = self._clock(), router.silent_since
        if not router.answered or now < router.counts_from:
            return False
        return since is None or now - since < self._pace.silence

    async def _close(self, router: _Router) -> None:
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


def _waits(view: RouterView | None) -> bool:
    """Whether any request waits in this router's queue."""
    return view is not None and view.report is not None and view.report.queued > 0


def _is_ready(status: Mapping[str, Any]) -> bool:
    conditions = status.get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
