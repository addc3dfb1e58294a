"""`shoal up`: the operator's planner over pods that are processes on this machine.

Level-triggered, as the operator is on Kubernetes: a changed document, a process that ends or
becomes ready, a new answer of the router only wake the loop; each turn looks at everything,
plans, acts, and sleeps once there is nothing left to do.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from shoal.api.types import InferenceService
from shoal.operator.claims import claims
from shoal.operator.local.container import router_container
from shoal.operator.local.mishaps import Mishaps
from shoal.operator.local.pods import Pods, end_leftovers
from shoal.operator.local.ports import Ports, is_free, reachable
from shoal.operator.local.process import Machine
from shoal.operator.local.reconcile import Reconciler
from shoal.operator.local.records import SupervisorInfo
from shoal.operator.local.settings import NotAnAddress, PortTaken, SupervisorSettings, Update
from shoal.operator.local.store import ROUTER_POD, Store
from shoal.operator.observe import RouterView
from shoal.operator.platform import LOCAL
from shoal.operator.router_client import RouterClient
from shoal.operator.swapper import Swapper

INTERRUPTED = 130
_LEFTOVER_SECONDS = 5.0
_WORKER_GRACE_SECONDS = 5.0  # once the router has ended nothing is in flight
_ROUTER_MARGIN_SECONDS = 3.0
_EAGER_SECONDS = 0.2  # between two questions to the router while something is under way


async def supervise(
    store: Store,
    settings: SupervisorSettings,
    *,
    on_update: Callable[[Update], None],
    stop: asyncio.Event | None = None,
    meanwhile: AbstractContextManager[object] | None = None,
) -> int:
    """Runs until SIGINT, SIGTERM or `stop`; returns the exit code (0: everything ended in order).

    `meanwhile` is entered once nothing stands in the way any more and left at the end, while
    nobody else can serve from the store: the place to change its services for this run.

    Raises SupervisorRuns where another supervisor holds the store, PortTaken where the router's
    ports are not free, and NotAnAddress where it cannot listen on such a host. A second signal
    kills all processes at once and returns 130.
    """
    on_update = _unless_nobody_reads(on_update)
    ports = Ports(random.Random())
    http_port = settings.http_port or ports.take()
    grpc_port = settings.grpc_port or ports.take()
    host = reachable(settings.host)
    info = SupervisorInfo(
        os.getpid(), f"http://{host}:{http_port}", f"{host}:{grpc_port}", time.time()
    )
    with store.hold(info):
        for name in await end_leftovers(store, _LEFTOVER_SECONDS):
            on_update(Update("supervisor", "supervisor", f"ended {name}, left by an earlier run"))
        _require_free(settings, http_port, grpc_port)
        store.clear_observed()
        supervisor = _Supervisor(store, settings, info, ports, on_update, stop or asyncio.Event())
        with _signals(supervisor), meanwhile or nullcontext():
            return await supervisor.run(http_port, grpc_port)


class _Supervisor:
    """One run: the loop, and its end."""

    def __init__(
        self,
        store: Store,
        settings: SupervisorSettings,
        info: SupervisorInfo,
        ports: Ports,
        on_update: Callable[[Update], None],
        stop: asyncio.Event,
    ) -> None:
        self._store = store
        self._settings = settings
        self._info = info
        self._on_update = on_update
        self._stop = stop
        self._killed = asyncio.Event()
        self._wake = asyncio.Event()
        machine = Machine(ports)
        self._clock = machine.clock
        self._mishaps = Mishaps(on_update)
        self._pods = Pods(
            store,
            settings,
            machine,
            mishaps=self._mishaps,
            changed=self._wake.set,
            on_update=on_update,
        )
        self._swapper = Swapper(lambda _: self._wake.set())
        self._reconciler = Reconciler(store, self._pods, info.url, self._swapper)
        self._services: dict[str, InferenceService] = {}
        self._wrong: dict[str, str] = {}
        self._signature: tuple[object, ...] | None = None
        self._views: Mapping[str, RouterView] | None = None
        self._settled = False

    def interrupt(self) -> None:
        """A signal: the first asks for an end in order, the second for one at once."""
        if self._stop.is_set():
            self._killed.set()
            self._pods.kill_all()
        self._stop.set()
        self._wake.set()

    async def run(self, http_port: int, grpc_port: int) -> int:
        container = router_container(self._settings, http_port, grpc_port, self._store.routes_dir)
        beside = [
            asyncio.create_task(self._watch_router()),
            asyncio.create_task(self._watch_services()),
            asyncio.create_task(self._keep_house()),
            asyncio.create_task(self._wake_on_stop()),
        ]
        try:
            self._store.routes_dir.mkdir(parents=True, exist_ok=True)
            self._pods.run(container)
            while not self._stop.is_set():
                self._wake.clear()
                busy = self._turn()
                for task in beside:
                    if task.done():
                        task.result()
                if not busy:
                    await self._wake.wait()
                await asyncio.sleep(0)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await self._swapper.close()
            await self._end()
        return INTERRUPTED if self._killed.is_set() else 0

    def _turn(self) -> bool:
        """Looks at every service once; whether there may be more to do at once."""
        with self._mishaps.around("reading the services"):
            self._read_services()
        owned = claims(self._services.values(), LOCAL)
        now = self._clock()
        busy = False
        for name, service in self._services.items():
            with self._mishaps.around(f"service {name}"):
                acted, news = self._reconciler.reconcile(service, owned[name], self._views, now)
                busy |= acted
                for update in news:
                    self._on_update(update)
        for name in self._store.known() - self._services.keys() - self._wrong.keys():
            with self._mishaps.around(f"service {name}"):
                if self._reconciler.remove(name, self._views, now):
                    self._on_update(Update("service", name, "removed"))
        self._settled = all(
            record.ready and record.drain_started is None for record in self._pods.records
        ) and all(self._ready(name) for name in self._services)
        return busy

    def _read_services(self) -> None:
        signature = self._store.services_signature()
        if signature == self._signature:
            return
        good, wrong = self._store.read_services()
        self._signature = signature
        # A document that does not parse leaves its service as it was.
        kept = {name: self._services[name] for name in wrong if name in self._services}
        self._services = dict(sorted((kept | good).items()))
        for name, problem in wrong.items():
            if self._wrong.get(name) != problem:
                self._on_update(Update("service", name, f"left as it was: {problem}", "error"))
        self._wrong = wrong

    def _ready(self, name: str) -> bool:
        view = (self._views or {}).get(name)
        table = self._store.routes(name)
        return view is not None and table is not None and view.generation == table.generation

    async def _watch_services(self) -> None:
        """Wakes the loop when a document changes, and while a drain's deadline may pass."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            draining = any(record.drain_started for record in self._pods.records)
            if draining or self._reconciler.due(self._clock()):
                self._wake.set()
            with self._mishaps.around("reading the services"):
                if self._store.services_signature() != self._signature:
                    self._wake.set()

    async def _watch_router(self) -> None:
        """Keeps the router's answer fresh, and wakes the loop when it differs."""
        client = RouterClient(self._info.grpc_address)
        try:
            while True:
                scaled = {name for name, s in self._services.items() if _follows_load(s)}
                views = await client.views(within=2.0, scaled=scaled)
                if views != self._views or scaled:
                    self._wake.set()
                self._views = views
                pause = self._settings.load_seconds if self._settled else _EAGER_SECONDS
                await asyncio.sleep(pause)
        finally:
            await client.close()

    async def _keep_house(self) -> None:
        """Bounds the logs, and tries again what failed."""
        while True:
            await asyncio.sleep(self._settings.house_seconds)
            with self._mishaps.around("bounding the logs"):
                self._pods.bound_logs()
            if self._mishaps:
                self._pods.write_records()
                self._wake.set()

    async def _wake_on_stop(self) -> None:
        await self._stop.wait()
        self._wake.set()

    async def _end(self) -> None:
        """The router first: it takes nothing new and ends what is in flight while the workers
        still serve it. Then the workers, which have nothing left to do."""
        self._on_update(Update("supervisor", "supervisor", "stopping"))
        grace = self._settings.stop_seconds + _ROUTER_MARGIN_SECONDS
        await self._pods.end(ROUTER_POD, 0.0 if self._killed.is_set() else grace)
        await self._pods.end_workers(0.0 if self._killed.is_set() else _WORKER_GRACE_SECONDS)
        self._store.clear_observed()
        for name in self._store.known():
            with self._mishaps.around(f"removing the status of {name}"):
                self._store.forget(name)


def _follows_load(service: InferenceService) -> bool:
    """Whether what routers say of the load may change the plan."""
    return service.spec.autoscaling is not None or service.spec.rollout.canary is not None


def _require_free(settings: SupervisorSettings, http_port: int, grpc_port: int) -> None:
    for port, flag in ((http_port, "--port"), (grpc_port, "--grpc-port")):
        try:
            free = is_free(settings.host, port)
        except OSError as error:
            raise NotAnAddress(settings.host, error) from error
        if not free:
            raise PortTaken(settings.host, port, flag)


def _unless_nobody_reads(on_update: Callable[[Update], None]) -> Callable[[Update], None]:
    """News that nobody can be told (a closed pipe, a full disk) stop nothing."""

    def tell(update: Update) -> None:
        with suppress(OSError):
            on_update(update)

    return tell


@contextmanager
def _signals(supervisor: _Supervisor) -> Iterator[None]:
    """SIGINT and SIGTERM reach the supervisor, where this is the main thread."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    with suppress(ValueError, RuntimeError):  # another thread: `stop` is the only way
        for number in numbers:
            loop.add_signal_handler(number, supervisor.interrupt)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
