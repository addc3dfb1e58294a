"""The router's core: services by name, model ids, the way in for every front.

One instance a process, on one event loop. Fronts (HTTP, gRPC) call `text` and `submit`; the
watcher of route tables calls `apply`; `run` keeps time.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from shoal.api.routes import RouteTable
from shoal.api.v1 import engine_pb2
from shoal.router import refusals
from shoal.router.dispatch import Dispatcher, DispatchSettings
from shoal.router.generation import Generation, GenerationError, GenerationRequest
from shoal.router.metrics import RouterCollector
from shoal.router.text import TextModel
from shoal.router.texts import LoadText, ServiceTexts

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1


class Service:
    """One service: who dispatches its requests, and who knows its text."""

    def __init__(self, dispatcher: Dispatcher, texts: ServiceTexts) -> None:
        self.dispatcher = dispatcher
        self.texts = texts

    @property
    def table(self) -> RouteTable:
        return self.dispatcher.table

    @property
    def queued(self) -> int:
        """Requests that wait for a replica, tokenized or not."""
        return len(self.dispatcher.queue) + self.texts.waiting


class RouterCore:
    """See the module. All methods belong on the event loop."""

    def __init__(
        self,
        *,
        load_text: LoadText = TextModel.load,
        settings: DispatchSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.services: dict[str, Service] = {}
        self.registry = CollectorRegistry()
        self.registry.register(RouterCollector(self.services))
        self.clock = clock
        self._load_text = load_text
        self._settings = settings or DispatchSettings()
        self._rng = rng or random.Random()
        self._owners: dict[str, str] = {}  # model id -> service
        self._ready = False
        self._stopping = False
        self._closing: set[asyncio.Task[None]] = set()

    # For fronts

    @property
    def ready(self) -> bool:
        """Whether requests can be routed: the route tables have been read."""
        return self._ready

    def models(self) -> list[tuple[str, str]]:
        """(model id, service) of everything served."""
        return list(self._owners.items())

    def find(self, model_id: str) -> str | None:
        """The service that serves a model id."""
        return self._owners.get(model_id)

    def session_header(self, service: str) -> str:
        """Name of the header whose requests prefer one replica, in lower case."""
        return self._service(service).table.session_header.lower()

    def pinned(self, service: str, header: Callable[[bytes], bytes | None]) -> str | None:
        """The revision that the table names for a request with such headers, where it can be had;
        `header` gives a header's value by its name in lower case."""
        found = self._service(service)
        for pin in found.table.pins:
            said = header(pin.header.encode("latin-1"))
            if said is not None and said.decode("latin-1") == pin.value:
                replicas = found.dispatcher.replicas.values()
                if any(r.available and r.revision == pin.revision for r in replicas):
                    return pin.revision
        return None

    def service_model(self, service: str) -> engine_pb2.Model | None:
        """What the service's replicas said of their model; None before the first of them."""
        return self._service(service).texts.model(None)

    def known_text(self, service: str) -> TextModel | None:
        """What `text` gives where it need not wait, else None. Raises GenerationError 404."""
        found = self._service(service)
        return found.texts.text(found.dispatcher.selection.draw(self._rng.random()))

    async def text(
        self,
        service: str,
        timeout: float | None = None,  # noqa: ASYNC109 (bounds a wait in a queue, not the call)
    ) -> TextModel:
        """The service's tokenizer and template; waits for a first replica where none has been
        seen, at most `timeout` seconds (None: the table's queue timeout).

        Hand it on as `GenerationRequest.text`. Raises GenerationError: 404, 429, 503.
        """
        text = self.known_text(service)
        if text is not None:
            return text
        found = self._service(service)
        limit = found.table.queue_timeout_seconds if timeout is None else timeout
        return await self._await_text(found, limit)

    def submit(self, request: GenerationRequest) -> Generation:
        """Sends the request to a replica or queues it. Raises GenerationError where it is
        refused at once."""
        service = self._service(request.service)
        return service.dispatcher.submit(request, service.texts.key_of(request.text))

    # For the process

    def apply(self, tables: Mapping[str, RouteTable]) -> None:
        """Serves these tables from now on, and nothing else."""
        for name in [name for name in self.services if name not in tables]:
            self._close(self.services.pop(name), f"the service {name} was deleted")
        self._owners = {}
        for name in sorted(tables):
            table = tables[name]
            service = self.services.get(name)
            if service is None:
                dispatcher = Dispatcher(
                    table, self._settings, self.clock, self._rng, self._on_model
                )
                service = self.services[name] = Service(dispatcher, ServiceTexts(self._load_text))
            dispatcher = service.dispatcher
            dispatcher.apply(table)
            revisions = {endpoint.revision for endpoint in table.endpoints}
            service.texts.prune(revisions)
            dispatcher.stats.prune(revisions)
            for model_id in table.models:
                owner = self._owners.setdefault(model_id, name)
                if owner != name:
                    log.warning("model id %s belongs to %s, not to %s", model_id, owner, name)
        self._ready = not self._stopping

    async def run(self) -> None:
        """Keeps time. Never returns."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = self.clock()
            for service in list(self.services.values()):
                service.dispatcher.tick(now)

    @property
    def unfinished(self) -> int:
        """Requests accepted and not ended."""
        return sum(service.dispatcher.stats.open for service in self.services.values())

    def stop_accepting(self) -> None:
        """`ready` is false from now on; what is under way goes on."""
        self._ready = False
        self._stopping = True

    async def close(self) -> None:
        """Fails what is unfinished and ends all connections."""
        self.stop_accepting()
        for service in self.services.values():
            self._close(service, "the router is shutting down")
        self.services.clear()
        self._owners = {}
        if self._closing:
            await asyncio.wait(self._closing)

    def _service(self, name: str) -> Service:
        service = self.services.get(name)
        if service is None:
            raise GenerationError(404, "model_not_found", f"there is no service {name!r}")
        return service

    def _close(self, service: Service, why: str) -> None:
        error = GenerationError(503, "gone", why, retry_after=1.0)
        service.texts.close(error)
        task = asyncio.create_task(service.dispatcher.close(error))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _on_model(
        self, dispatcher: Dispatcher, revision: str, key: str, model: engine_pb2.Model
    ) -> None:
        service = self.services.get(dispatcher.table.service)
        if service is not None and service.dispatcher is dispatcher:
            service.texts.learn(revision, key, model)

    async def _await_text(self, service: Service, limit: float) -> TextModel:
        table, dispatcher, texts = service.table, service.dispatcher, service.texts
        if service.queued >= table.max_queued:
            dispatcher.stats.refused("queue_full", 429)
            raise refusals.queue_full(
                table.service, service.queued, table.max_queued, dispatcher.retry_after()
            )
        try:
            async with asyncio.timeout(limit):
                while True:
                    revision = dispatcher.selection.draw(self._rng.random())
                    if (text := texts.text(revision)) is not None:
                        return text
                    if failure := texts.failure(revision):
                        raise GenerationError(503, "model_unusable", failure)
                    await texts.news()
        except TimeoutError:
            dispatcher.stats.refused("no_replica", 503)
            raise refusals.no_replica(table.service, limit, dispatcher.retry_after()) from None
