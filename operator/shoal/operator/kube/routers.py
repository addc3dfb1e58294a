"""What the routers say: which tables they act on, whom they have admitted, what is in flight.

Each router pod is asked by itself, never twice at the same time: often while something is under
way anywhere, seldom else. A router that has not answered for a while is left out, so that a dead
one holds nothing up; a pod that is gone is left out at once.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

from shoal.api.names import PORT_ROUTER_GRPC
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.kinds import PODS
from shoal.operator.observe import RouterView

log: Final = logging.getLogger(__name__)

_ENDED: Final = ("Failed", "Succeeded")

Views = Mapping[str, RouterView]


class RouterCalls(Protocol):
    """A connection to one router."""

    async def views(self, within: float) -> Views | None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RouterPace:
    """Seconds."""

    eager: float = 1.0  # between two questions while something is under way
    idle: float = 5.0
    answer: float = 3.0  # longest wait for one answer
    silence: float = 5.0  # without an answer for so long: left out


@dataclass(slots=True)
class _Router:
    calls: RouterCalls
    views: Views = field(default_factory=lambda: MappingProxyType({}))
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
        pace: RouterPace = RouterPace(),  # frozen
    ) -> None:
        """`changed(service)` hears of each service whose views differ from before."""
        self._api = api
        self._namespace = namespace
        self._selector = selector
        self._connect = connect
        self._clock = clock
        self._changed = changed
        self._pace = pace
        self._routers: dict[str, _Router] = {}  # by address
        self._under_way: set[str] = set()
        self._hurry = asyncio.Event()
        self._counted: frozenset[str] = frozenset()

    def views(self, service: str) -> tuple[RouterView, ...]:
        """One a router that answers; a router that does not know the service acts on no table."""
        return tuple(
            router.views.get(service, RouterView(0))
            for _, router in sorted(self._routers.items())
            if self._counts(router)
        )

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

    async def run(self, asked_once: asyncio.Event) -> None:
        """Asks for ever; `asked_once` is set after each router was asked once."""
        try:
            while True:
                self._hurry.clear()
                await self._round()
                asked_once.set()
                pace = self._pace.eager if self._under_way else self._pace.idle
                if not self._under_way:
                    try:
                        await asyncio.wait_for(self._hurry.wait(), pace)
                    except TimeoutError:
                        continue
                # What has just begun is not known to routers yet.
                await asyncio.sleep(self._pace.eager)
        finally:
            # Whoever leads again connects anew.
            known, self._routers, self._counted = self._routers, {}, frozenset()
            for router in known.values():
                await self._close(router)

    async def _round(self) -> None:
        """Finds the routers and asks those that are not being asked; waits a little for them."""
        try:
            await self._find()
        except ApiError as error:
            log.warning("router pods cannot be listed: %s", error)
        for address, router in self._routers.items():
            if router.asking is None or router.asking.done():
                router.asking = asyncio.create_task(self._ask(address, router))
        asking = [r.asking for r in self._routers.values() if r.asking is not None]
        if asking:
            await asyncio.wait(asking, timeout=self._pace.eager)
        self._note_counted()

    async def _find(self) -> None:
        found = set()
        async for pods, _ in self._api.select(PODS, self._namespace, self._selector):
            for pod in pods:
                status = pod.get("status") or {}
                if (ip := status.get("podIP")) and status.get("phase") not in _ENDED:
                    host = f"[{ip}]" if ":" in ip else ip
                    found.add(f"{host}:{PORT_ROUTER_GRPC}")
        for address in self._routers.keys() - found:
            router = self._routers.pop(address)
            self._tell(router.views)
            await self._close(router)
        for address in found - self._routers.keys():
            self._routers[address] = _Router(self._connect(address))

    async def _ask(self, address: str, router: _Router) -> None:
        began = self._clock()
        views = await router.calls.views(self._pace.answer)
        if views is None:
            if router.silent_since is None:
                router.silent_since = began
                if router.answered:
                    log.warning("router %s does not answer", address)
            return
        before, router.views = router.views, views
        router.answered, router.silent_since = True, None
        for service in before.keys() | views.keys():
            if self._differs(service, before.get(service), views.get(service)):
                self._changed(service)

    def _differs(self, service: str, before: RouterView | None, after: RouterView | None) -> bool:
        """Requests come and go all the time; their number matters while a pod drains."""
        if service in self._under_way or before is None or after is None:
            return before != after
        return before.generation != after.generation or {
            name: (view.address, view.admitted) for name, view in before.endpoints.items()
        } != {name: (view.address, view.admitted) for name, view in after.endpoints.items()}

    def _counts(self, router: _Router) -> bool:
        if not router.answered:
            return False
        since = router.silent_since
        return since is None or self._clock() - since < self._pace.silence

    def _note_counted(self) -> None:
        """Tells everybody where a router began or ceased to count: all services have it."""
        counted = frozenset(a for a, router in self._routers.items() if self._counts(router))
        for address in counted ^ self._counted:
            if router := self._routers.get(address):
                self._tell(router.views)
        if counted != self._counted:
            for service in sorted(self._under_way):
                self._changed(service)
        self._counted = counted

    def _tell(self, services: Sequence[str] | Views) -> None:
        for service in services:
            self._changed(service)

    async def _close(self, router: _Router) -> None:
        if router.asking is not None:
            router.asking.cancel()
        await router.calls.close()
