"""The operator process: what runs always, and what runs only while it leads.

Watches, lists and probes run always, so that a standby knows everything when its turn comes.
Leading begins with a list that finds what watches lost and with one answer of the routers; only
then do workers start, so that a restart with everything in place writes nothing. It ends with
the lease: workers are gone before it is released, or before anybody else can have it.
"""

import asyncio
import logging
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

from shoal.api.types import ScalingDriver
from shoal.operator.coldstart import ColdStarts
from shoal.operator.kube.access import Access
from shoal.operator.kube.applier import Applier
from shoal.operator.kube.book import ServiceBook
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError
from shoal.operator.kube.events import EventPoster
from shoal.operator.kube.external_metrics import ExternalMetricsServer, ServingFiles
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.keda import serve_scaler
from shoal.operator.kube.kinds import (
    AUTOSCALERS,
    INFERENCE_SERVICES,
    POD_MONITORS,
    SCALED_OBJECTS,
    STREAMED,
    Kind,
)
from shoal.operator.kube.lease import Leadership
from shoal.operator.kube.loadwatch import LoadWatch
from shoal.operator.kube.metrics import OperatorMetrics, ServiceFigures
from shoal.operator.kube.progress import FetchProgress
from shoal.operator.kube.reconcile import Reconciler, Surroundings
from shoal.operator.kube.relist import ListKeeper, Relister
from shoal.operator.kube.routers import RouterFleet, router_addresses
from shoal.operator.kube.settings import OperatorSettings
from shoal.operator.kube.streams import Streams
from shoal.operator.kube.web import serve_metrics, serve_probes
from shoal.operator.kube.workers import Workers
from shoal.operator.kube.workqueue import Pace, WorkQueue
from shoal.operator.kube.world import World
from shoal.operator.router_client import RouterClient
from shoal.operator.scaler import Scalers, scales_itself
from shoal.operator.swapper import Swapper
from shoal.operator.trials import Trials
from shoal.operator.webhooks import Webhooks

log: Final = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0
_ROUTERS_SECONDS: Final = 4.0
_STUCK_SECONDS: Final = 120.0
_RELEASE_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_LIST_SECONDS: Final = 30.0
_STEP_BACK_SECONDS: Final = 10.0

# Feeds the operator until the event is set: (feed, listed, stop, ready). See `handlers.watch`.
Watch = Callable[
    [Feed, Callable[[], None], asyncio.Event, asyncio.Event], Coroutine[Any, Any, None]
]


async def operate(settings: OperatorSettings, access: Access, watch: Watch) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status."""
    operator = _Operator(settings, access)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(operator.api)
        await stack.enter_async_context(
            serve_metrics("", settings.metrics_port, operator.metrics.registry)
        )
        await stack.enter_async_context(
            serve_probes("", settings.health_port, operator.unhealthy, operator.unready)
        )
        beside = await stack.enter_async_context(_scaled_by_others(operator, settings))
        return await operator.run(watch, beside)


@asynccontextmanager
async def _scaled_by_others(
    operator: "_Operator", settings: OperatorSettings
) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    """Serves the load to autoscalers where that is switched on; the tasks that do."""
    tasks = []
    async with AsyncExitStack() as stack:
        if settings.external_metrics_port:
            assert settings.tls_cert_file is not None, "read_settings sees to it"
            assert settings.tls_key_file is not None, "read_settings sees to it"
            server = ExternalMetricsServer(
                operator.api,
                operator.loads,
                host="",
                port=settings.external_metrics_port,
                files=ServingFiles(settings.tls_cert_file, settings.tls_key_file),
                wall=time.time,
            )
            tasks.append(asyncio.create_task(server.run(), name="external metrics"))
        if settings.keda_port:
            await stack.enter_async_context(serve_scaler("", settings.keda_port, operator.loads))
        if settings.external_metrics_port or settings.keda_port:
            tasks.append(asyncio.create_task(operator.loads.run(), name="loads"))
        try:
            yield tasks
        finally:
            for task in tasks:
                await _end(task)


def _optional(settings: OperatorSettings) -> tuple[Kind, ...]:
    """Kinds that the cluster need not know, of those that the operator makes."""
    drivers = settings.platform.drivers
    return (
        POD_MONITORS,
        *((AUTOSCALERS,) if ScalingDriver.HPA in drivers else ()),
        *((SCALED_OBJECTS,) if ScalingDriver.KEDA in drivers else ()),
    )


class _Operator:
    """One process: its parts, and how they are started and stopped."""

    def __init__(self, settings: OperatorSettings, access: Access) -> None:
        self._settings = settings
        # Of this very pod: its containers run one after the other.
        place = f"{settings.identity}_{settings.pod_uid}_" if settings.pod_uid else None
        identity = f"{place or f'{settings.identity}_'}{uuid.uuid4().hex[:8]}"
        self.metrics = OperatorMetrics()
        self.api = Api(access, may_write=self._leads, count=self.metrics.called)
        self._leadership = Leadership(
            self.api,
            namespace=settings.lease_namespace or access.namespace,
            name=settings.lease_name,
            identity=identity,
            predecessors=place,
            monotonic=time.monotonic,
            wall=time.time,
        )
        self._world = World()
        self._book = ServiceBook()
        self._feed = Feed(self._world, self._book, self._wake)
        self._relister = Relister(
            self.api, self._world, settings.namespaces, self._feed, _optional(settings)
        )
        self._lists = ListKeeper(self._relister, time.monotonic)
        self._streams = Streams(
            self.api,
            self._feed,
            STREAMED,
            settings.namespaces,
            listed=self._relister.version,
            list_again=self._lists.fresh,
            jitter=random.Random().random,
        )
        self._events = EventPoster(self.api, identity, time.time)
        self._progress = FetchProgress(self.api, self._wake)
        self._fleet = RouterFleet(
            partial(
                router_addresses,
                self.api,
                settings.router_namespace or access.namespace,
                settings.router_selector,
            ),
            connect=RouterClient,
            clock=time.monotonic,
            changed=self._wake,
            all_changed=self._wake_all,
        )
        self._scalers = Scalers()
        self._trials = Trials(settings.platform, Webhooks(time.monotonic))
        self._swapper = Swapper(self._wake)
        self._starts = ColdStarts(self.metrics.started)
        reconciler = Reconciler(
            self._world,
            self._book,
            Applier(self.api, self._world, self._feed, time.time, self._swapper.begin),
            self._fleet,
            self._progress,
            self._events,
            self._scalers,
            self._trials,
            self._starts,
            self._swapper,
            Surroundings(
                platform=settings.platform,
                url=f"{settings.router_url}/v1" if settings.router_url else None,
                knows=self._relister.knows,
                wall=time.time,
                crowd=self._crowd,
                scaler_address=settings.scaler_address,
            ),
        )
        self.loads = LoadWatch(
            self.api,
            self._book,
            namespace=settings.router_namespace or access.namespace,
            selector=settings.router_selector,
            connect=RouterClient,
            wall=time.time,
        )
        self._queue = WorkQueue(Pace(), random.Random().random)
        self._workers = Workers(
            self._queue,
            reconciler.reconcile,
            self.metrics,
            time.monotonic,
            settings.workers,
        )
        self.metrics.show(leads=self._leads, queued=self._queued, services=self._figures)
        self._works = False  # leads, and knows enough to act
        self._watching = asyncio.Event()

    def unhealthy(self) -> str | None:
        """Why the process should be restarted; that this answers shows that the loop turns."""
        took = self._workers.longest()
        return f"one look at a service takes {took:.0f} s" if took > _STUCK_SECONDS else None

    def unready(self) -> str | None:
        return None if self._lists.any else "the first list is not in"

    async def run(self, watch: Watch, beside: Sequence[asyncio.Task[None]]) -> int:
        """Until it is told to stop, or one of its parts or of those `beside` it ends."""
        stop, stop_watching = asyncio.Event(), asyncio.Event()
        _take_signals(stop)
        await _first(self._wait_for_types(), stop.wait())
        if stop.is_set():
            return 0
        leading = asyncio.create_task(self._lead(stop), name="leadership")
        lists = asyncio.create_task(self._lists.run(), name="lists")
        watches = asyncio.create_task(
            watch(self._feed, self._lists.request, stop_watching, self._watching), name="watches"
        )
        streams = asyncio.create_task(self._stream(), name="streams")
        signals = asyncio.create_task(self._take_signals_back(stop), name="signals")
        asked = asyncio.create_task(stop.wait(), name="stop")
        try:
            done, _ = await asyncio.wait(
                [leading, lists, watches, streams, asked, *beside],
                return_when=asyncio.FIRST_COMPLETED,
            )
            if asked in done:
                return 0
            failed = [task for task in done if task.exception() is not None]
            for task in failed:
                log.error("%s ended", task.get_name(), exc_info=task.exception())
            return 1 if failed else 0  # a signal that the watches' framework took for itself
        finally:
            # Leading ends first and by itself: it stops the workers and releases the lease.
            stop.set()
            await asyncio.wait([leading], timeout=_RELEASE_SECONDS)
            stop_watching.set()
            for task in (leading, lists, streams, signals, asked, watches):
                task.cancel()
            await asyncio.wait([lists, streams, watches], timeout=_CLOSE_SECONDS)

    async def _stream(self) -> None:
        await self._lists.first()
        await self._streams.run()

    async def _take_signals_back(self, stop: asyncio.Event) -> None:
        """The watches' framework takes the signals when it starts."""
        await self._watching.wait()
        _take_signals(stop)

    async def _wait_for_types(self) -> None:
        """Until the cluster knows InferenceServices; says so, as nothing works without."""
        said = ""
        while True:
            try:
                if await self.api.serves(INFERENCE_SERVICES):
                    return
                why = "the cluster does not know InferenceServices; install the chart shoal-crds"
            except ApiError as error:
                why = f"the API server does not answer as it should: {error}"
            if why != said:
                log.warning("%s", why)
            said = why
            await asyncio.sleep(_RETRY_SECONDS)

    async def _lead(self, stop: asyncio.Event) -> None:
        await _first(self._lists.first(), stop.wait())  # who cannot list must not lead
        while not stop.is_set():
            await _first(self._leadership.acquire(), stop.wait())
            if not stop.is_set():
                await _first(self._leadership.keep(), self._work(), stop.wait())
            if self._leadership.holds() and not stop.is_set():
                # It leads and cannot work: somebody else shall try.
                await self._leadership.release()
                await _first(asyncio.sleep(_STEP_BACK_SECONDS), stop.wait())
        await self._leadership.release()

    async def _work(self) -> None:
        """What a leader does, until it is cancelled; returns where it cannot."""
        began = time.monotonic()
        try:
            await asyncio.wait_for(self._lists.fresh(), _LIST_SECONDS)
        except TimeoutError:
            log.error("no list within %.0f s", _LIST_SECONDS)
            return
        asked = asyncio.Event()
        helpers = [
            asyncio.create_task(coroutine)
            for coroutine in (self._fleet.run(asked), self._progress.run(), self._events.run())
        ]
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), _ROUTERS_SECONDS)
            self._works = True
            self._wake_all()
            took = time.monotonic() - began
            count = len(self._world[INFERENCE_SERVICES])
            log.info("working on %d services after %.1f s", count, took)
            await _first(self._workers.run(), *helpers)
        finally:
            self._works = False
            self._fleet.rest()
            self._scalers.clear()
            self._trials.clear()
            await self._swapper.close()
            self._starts.clear()
            for task in helpers:
                await _end(task)

    def _leads(self) -> bool:
        return self._leadership.holds()

    def _queued(self) -> int:
        return len(self._queue)

    def _crowd(self) -> bool:
        return self._workers.crowd()

    def _wake(self, key: str, delay: float = 0.0) -> None:
        if self._works:
            self._workers.add(key, delay)

    def _wake_all(self) -> None:
        for key in self._book:
            self._wake(key)

    def _figures(self) -> Mapping[str, ServiceFigures]:
        """Of all services, from the operator that leads; others know less."""
        figures = {}
        for key, service in self._book.readable() if self._works else ():
            scales = scales_itself(service)
            wanted = self._scalers.wanted(key) if scales else service.spec.replicas
            if wanted is not None:  # it was looked at already
                figures[key] = ServiceFigures(wanted, self._trials.weight(key))
        return figures


def _take_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _first(*coroutines: Awaitable[object]) -> None:
    """Runs all until one of them ends; the others are cancelled. Passes on what it raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            await _end(task)


async def _end(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
