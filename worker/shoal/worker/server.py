"""The engine's gRPC server: one port, open before the model is loaded.

    server = EngineServer(settings); await server.start()      # health: NOT_SERVING
    server.serve(engine, model)                                 # health: SERVING
    await server.drain(30.0); await server.stop()

The engine runs in a thread of its own (`shoal.worker.loop`); everything here is on the event
loop. Health is whether that thread moves on: "" and the service's name say whether new
requests are welcome, "live" whether the process is of any use.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.worker.cache_watch import CacheWatch
from shoal.worker.loop import EngineLoop, Report, StepEngine
from shoal.worker.served import Served
from shoal.worker.streams import Stream, StreamHub
from shoal.worker.swap import SwapError, Swapper

log = logging.getLogger(__name__)

T = TypeVar("T")
_Context = grpc.aio.ServicerContext[Any, Any]

SERVICE: Final = engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name
LIVENESS: Final = "live"
MAX_MESSAGE_BYTES: Final = 64 << 20
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server on it
    # A router that vanished without a word holds its requests' blocks until this notices.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)


class ListenError(OSError):
    """The port cannot be had; the message says which and how to choose another."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    stall_seconds: float = 30.0  # a step is given at least as long before it counts as a hang
    beat_seconds: float = 1.0  # how often every stream hears of the engine
    health_seconds: float = 0.1  # how often health is looked at
    max_pending_deltas: int = 65_536  # of one slow client: 5 s of 256 sequences at 50 tokens/s
    max_pending_changes: int = 65_536  # of one slow watcher of the cache


@dataclass(frozen=True, slots=True)
class _Serving:
    """What exists once the model is loaded."""

    loop: EngineLoop
    hub: StreamHub
    watch: CacheWatch
    models: Served
    swapper: Swapper | None


class EngineServer:
    """Owns the port, the engine's thread and the streams."""

    def __init__(
        self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._grpc = grpc.aio.server(options=list(_OPTIONS))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
        self._serving: _Serving | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._observe: Callable[[Report], None] | None = None
        self._drain_began: float | None = None
        self.address = ""  # host:port, once started
        self.failed = asyncio.Event()  # the engine is dead; only a new process helps
        self.failure = ""

    async def start(self) -> None:
        """Opens the port. Raises ListenError."""
        engine_pb2_grpc.add_EngineServicer_to_server(_Servicer(self), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc
        )
        host, wanted = self._settings.host, self._settings.port
        bracketed = f"[{host}]" if ":" in host else host
        try:
            port = self._grpc.add_insecure_port(f"{bracketed}:{wanted}")
        except RuntimeError as error:
            raise ListenError(
                f"cannot listen on {bracketed}:{wanted}: the port is in use or the address is not"
                " this machine's; choose others with --port and --host (0 is any free port)"
            ) from error
        self.address = f"{bracketed}:{port}"
        await self._set_health()
        await self._grpc.start()
        self._ticker = asyncio.create_task(self._tick())

    def serve(
        self,
        engine: StepEngine,
        model: engine_pb2.Model,
        observe: Callable[[Report], None] | None = None,
        swapper: Swapper | None = None,
    ) -> None:
        """Starts the engine's thread and admits requests. Once only. `observe` sees every
        report, on the event loop. Without a swapper weights cannot be swapped."""
        assert self._serving is None
        loop = asyncio.get_running_loop()
        engine_loop = EngineLoop(
            engine,
            lambda report: _post(loop, self._take, report),
            lambda reason: _post(loop, self._fail, reason),
            self._clock,
        )
        self._observe = observe
        self._serving = _Serving(
            engine_loop,
            StreamHub(engine_loop.submit, engine.load(), self._settings.max_pending_deltas),
            CacheWatch(engine_loop.submit, self._settings.max_pending_changes),
            Served(model, None if swapper is None else lambda: swapper.revisions),
            swapper,
        )
        engine_loop.start()

    async def drain(self, deadline_seconds: float) -> int:
        """Refuses new requests and waits for those in flight; returns the number of sequences
        left at the deadline. Drained once, the server stays so, and later deadlines count from
        then: SIGTERM after a preStop hook does not drain anew."""
        now = self._clock()
        if self._drain_began is None:
            self._drain_began = now
        await self._set_health()
        if self._serving is None:
            return 0
        self._serving.hub.draining = True
        self._serving.hub.beat()
        left = self._drain_began + deadline_seconds - now
        return await self._serving.hub.drained(max(0.0, left))

    async def stop(self, grace_seconds: float = 0.5) -> None:
        """Closes the port and all streams, and ends the engine's thread."""
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
        await self._grpc.stop(grace_seconds)
        if self._serving is not None:
            stop = self._serving.loop.stop
            if not await asyncio.to_thread(stop, self._settings.stall_seconds):
                log.error("the engine's thread does not end")

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._drain_began is not None

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is alive and moving."""
        return (
            self._serving is not None
            and not self.failed.is_set()
            and not self._serving.loop.stalled(self._settings.stall_seconds)
        )

    async def serving(self, context: _Context) -> _Serving:
        """Aborts the call with UNAVAILABLE while the model is not loaded."""
        if self._serving is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is not loaded yet")
        assert self._serving is not None  # abort raised
        return self._serving

    def _take(self, report: Report) -> None:
        assert self._serving is not None
        self._serving.hub.take(report)
        self._serving.watch.take(report)
        if self._observe is not None:
            self._observe(report)

    def _fail(self, reason: str) -> None:
        assert self._serving is not None
        self.failure = reason
        self._serving.hub.die(reason)
        self.failed.set()

    async def _tick(self) -> None:
        """Keeps health true, and the streams' idea of the load fresh while the engine moves."""
        next_beat = self._clock()
        while True:
            await self._set_health()
            if self._serving is not None and self.healthy and self._clock() >= next_beat:
                self._serving.hub.beat()
                next_beat = self._clock() + self._settings.beat_seconds
            await asyncio.sleep(self._settings.health_seconds)

    async def _set_health(self) -> None:
        ready = self.healthy and self._drain_began is None
        # Loading is a life too: only an engine that hangs or died is worth a restart.
        live = self.healthy or self._serving is None
        for service, good in (("", ready), (SERVICE, ready), (LIVENESS, live)):
            status = health_pb2.HealthCheckResponse.SERVING
            if not good:
                status = health_pb2.HealthCheckResponse.NOT_SERVING
            await self._health.set(service, status)


class _Servicer(engine_pb2_grpc.EngineServicer):
    """The methods of shoal.v1.Engine."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server

    async def Generate(
        self,
        request_iterator: AsyncIterator[engine_pb2.GenerateRequest],
        context: _Context,
    ) -> AsyncIterator[engine_pb2.GenerateBatch]:
        serving = await self._server.serving(context)
        stream = serving.hub.open()
        reader = asyncio.create_task(self._read(request_iterator, stream, serving))
        try:
            while (batch := await stream.next_batch()) is not None:
                yield batch
            if stream.overrun:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "the client reads too slowly: its requests were cancelled",
                )
        finally:
            reader.cancel()
            serving.hub.close(stream)

    async def _read(
        self,
        requests: AsyncIterator[engine_pb2.GenerateRequest],
        stream: Stream,
        serving: _Serving,
    ) -> None:
        try:
            async for request in requests:
                for start in request.start:
                    serving.hub.start(stream, start)
                for cancel in request.cancel:
                    serving.hub.cancel(stream, cancel)
        except (grpc.RpcError, grpc.aio.BaseError):
            log.debug("stream %d broke", stream.number)
        except Exception:
            log.exception("stream %d: a request could not be read", stream.number)
        stream.end_inputs()

    async def GetModel(
        self, request: engine_pb2.GetModelRequest, context: _Context
    ) -> engine_pb2.Model:
        return (await self._server.serving(context)).models.find(request.revision)

    async def WatchCache(
        self, request: engine_pb2.WatchCacheRequest, context: _Context
    ) -> AsyncIterator[engine_pb2.CacheEvents]:
        watch = (await self._server.serving(context)).watch
        watcher = watch.open()
        try:
            while True:
                for events in await watcher.next_events():
                    yield events
        finally:
            watch.close(watcher)

    async def Drain(
        self, request: engine_pb2.DrainRequest, context: _Context
    ) -> engine_pb2.DrainResponse:
        deadline = request.deadline_seconds
        if not math.isfinite(deadline) or deadline < 0:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"deadline_seconds is {deadline}, it must be a finite number from 0",
            )
        return engine_pb2.DrainResponse(unfinished=await self._server.drain(deadline))

    async def SwapWeights(
        self, request: engine_pb2.SwapWeightsRequest, context: _Context
    ) -> AsyncIterator[engine_pb2.SwapProgress]:
        serving = await self._server.serving(context)
        if self._server.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this replica is draining")
        if serving.swapper is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "weights are swapped only where one process computes the model",
            )
            raise AssertionError("abort raises")
        try:
            swapping = serving.swapper.swap(request, serving.models, serving.loop.submit)
            async with aclosing(swapping) as progress:
                async for message in progress:
                    yield message
        except SwapError as error:
            log.warning("no swap to revision %s: %s", request.revision, error)
            await context.abort(grpc.StatusCode[error.status], str(error))


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], value: T) -> None:
    """Runs `call(value)` on the loop. A closed loop means that nobody is left to be told."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, value)
