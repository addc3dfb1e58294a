"""The load of services that somebody else scales, from the routers themselves.

It runs in every operator, leading or not, since autoscalers ask any of them. Routers are asked
only while there are such services.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from shoal.api.scaling import ScalingDriver
from shoal.api.types import InferenceService
from shoal.operator.autoscale_load import (
    FORGOTTEN_SECONDS,
    Load,
    RouterReport,
    TtftHistory,
    total_load,
)
from shoal.operator.kube.book import ServiceBook
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.routers import RouterCalls, router_addresses

log: Final = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 2.0
_ANSWER_SECONDS: Final = 1.5


@dataclass(slots=True)
class _Watched:
    """What is known of one service's load."""

    reports: dict[str, RouterReport] = field(default_factory=dict)  # by router
    history: TtftHistory = field(default_factory=TtftHistory)


class LoadWatch:
    """Keeps the routers' reports on services whose driver is not the operator itself."""

    def __init__(
        self,
        api: Api,
        book: ServiceBook,
        *,
        namespace: str,
        selector: str,
        connect: Callable[[str], RouterCalls],
        wall: Callable[[], float],
    ) -> None:
        self._api = api
        self._book = book
        self._namespace = namespace
        self._selector = selector
        self._connect = connect
        self._wall = wall
        self._routers: dict[str, RouterCalls] = {}  # by address
        # Routers whose pods are ready, each with when it answered last, or was found.
        self._ready: dict[str, float] = {}
        self._watched: dict[str, _Watched] = {}  # by service
        self._round = asyncio.Event()

    def service(self, key: str) -> InferenceService | None:
        """The service `namespace/name`, if somebody else scales it."""
        entry = self._book.get(key)
        found = entry.service if entry is not None else None
        return found if found is not None and _driven(found) else None

    def load(self, key: str) -> Load | None:
        """The service's load; None where no router reports it."""
        watched = self._watched.get(key)
        if watched is None:
            return None
        now = self._wall()
        waited_for = {a for a, heard in self._ready.items() if now - heard < FORGOTTEN_SECONDS}
        return total_load(watched.reports, waited_for, watched.history, now)

    async def news(self) -> None:
        """Waits until routers were asked again."""
        await self._round.wait()

    async def run(self) -> None:
        """Asks for ever."""
        try:
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ask_all(), _LOOK_SECONDS * 3)
                done, self._round = self._round, asyncio.Event()
                done.set()
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            for router in self._routers.values():
                await router.close()
            self._routers.clear()

    async def _ask_all(self) -> None:
        keys = {key for key, service in self._book.readable() if _driven(service)}
        self._watched = {key: self._watched.get(key) or _Watched() for key in keys}
        if not keys:
            return
        try:
            await self._find()
        except ApiError as error:
            log.warning("router pods cannot be listed: %s", error)
        answers = await asyncio.gather(
            *(router.views(_ANSWER_SECONDS, "", keys) for router in self._routers.values())
        )
        now = self._wall()
        for address, views in zip(tuple(self._routers), answers, strict=True):
            if views is None:
                continue
            if address in self._ready:
                self._ready[address] = now
            for key, watched in self._watched.items():
                # A router that does not know the service has no request for it.
                view = views.get(key)
                report = view.report if view is not None else None
                watched.reports[address] = report or RouterReport(now, idle_seconds=float("inf"))
        for watched in self._watched.values():
            gone = watched.reports.keys() - self._routers.keys()
            for address in gone:
                del watched.reports[address]
            watched.history = watched.history.followed_by(watched.reports, now)

    async def _find(self) -> None:
        found: Mapping[str, bool] = await router_addresses(
            self._api, self._namespace, self._selector
        )
        for address in self._routers.keys() - found.keys():
            await self._routers.pop(address).close()
        for address in found.keys() - self._routers.keys():
            self._routers[address] = self._connect(address)
        now = self._wall()
        self._ready = {a: self._ready.get(a, now) for a, ready in found.items() if ready}


def _driven(service: InferenceService) -> bool:
    spec = service.spec.autoscaling
    return spec is not None and spec.driver is not ScalingDriver.INTERNAL
