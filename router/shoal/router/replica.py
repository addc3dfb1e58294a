"""One replica: its connection, what flies there, and what is known of it.

A connection is a channel with one `Generate` stream for all requests and one `WatchCache` stream
beside it. It is admitted once `GetModel` worked and the stream is open, and lost at the first
error of the stream (a killed process shows within milliseconds) or when it has been silent for
too long and its health check fails too. Then everything that flew there is handed back, and the
replica is connected again with growing pauses until it is retired.

Sends are coalesced: all Starts and Cancels of one loop turn travel in one message.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal.api.routes import Endpoint
from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.router.outlier import Outlier
from shoal.router.pick import Candidate

if TYPE_CHECKING:
    from shoal.router.piece import Piece

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20  # a model's tokenizer, a snapshot of a large cache
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Every attempt dials anew: pauses between attempts are ours, not the shared pool's.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]
_NEVER_REACHED = 5  # times the longest pause, between attempts to reach what never answered
ANSWERED = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Times in seconds."""

    connect_timeout: float = 5.0
    first_pause: float = 0.05  # before the second attempt to connect; grows by half each time
    longest_pause: float = 1.0
    silence: float = 5.0  # without a batch or heartbeat, until health is asked
    health_timeout: float = 2.0


class ReplicaEvents(Protocol):
    """Who owns the replica. Called on the event loop; must not raise."""

    def admitted(self, replica: "Replica", model: engine_pb2.Model) -> None:
        """It is connected and takes requests. `model` is kept by whoever wants it."""

    def turned(self, replica: "Replica", model: engine_pb2.Model) -> None:
        """Its weights were swapped: it serves another revision, over the same connection."""

    def lost(self, replica: "Replica", pieces: "list[Piece]") -> None:
        """The connection broke; `pieces` were under way there."""

    def batch(self, replica: "Replica", batch: engine_pb2.GenerateBatch) -> None:
        """Deltas and load arrived."""

    def cache(self, replica: "Replica", events: engine_pb2.CacheEvents) -> None:
        """Its prefix cache changed."""


class _Ended(Exception):
    """This connection is over; the message says why."""


class Replica:
    """Owned by a dispatcher. `pieces` maps the ids on the wire to what flies."""

    def __init__(
        self,
        endpoint: Endpoint,
        events: ReplicaEvents,
        settings: ReplicaSettings,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.name = endpoint.name
        self.address = endpoint.address
        self.wanted = endpoint.revision  # says the route table
        self.revision = endpoint.revision  # says the engine, once connected
        self.draining = endpoint.draining  # says the route table
        self.load = engine_pb2.Load()
        self.outlier = Outlier()
        self.text_key = ""  # same key, same tokenizer and template
        self.hash_seed = ""  # of its block hashes' root
        self.startup: tuple[engine_pb2.StartupPhase, ...] = ()  # what its start took
        self.block_size = 1
        self.in_flight = 0  # sequences
        self.pieces: dict[str, Piece] = {}
        self._events = events
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._slots = 1
        self._checks_revision = False  # the engine knows its own, so Starts can name it
        self._connected = False
        self._admissions = 0  # how often it was connected
        self._refusing = False  # until its next load says otherwise
        self._behind = False  # its engine lacks the revision that the table names
        self._retired = False
        self._sent_tokens = 0  # to prefill, sent since the last load
        self._candidate: Candidate | None = None
        self._heard_at = 0.0
        self._next_id = 0
        self._outgoing = engine_pb2.GenerateRequest()
        self._wake = asyncio.Event()
        self._turn = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def available(self) -> bool:
        """New requests may go there (an ejected replica only for want of others)."""
        return self._connected and not (
            self.draining or self._retired or self._refusing or self._behind or self.load.draining
        )

    def candidate(self) -> Candidate:
        """The frozen snapshot for `pick`, made anew only after a change."""
        if self._candidate is None:
            load = self.load
            self._candidate = Candidate(
                name=self.name,
                revision=self.revision,
                in_flight=self.in_flight,
                slots=self._slots,
                waiting=load.waiting,
                queued_prefill_tokens=load.queued_prefill_tokens + self._sent_tokens,
                prefill_tokens_per_second=load.prefill_tokens_per_second,
                step_seconds=load.step_seconds,
                ejected=self.outlier.ejected(self._clock()),
            )
        return self._candidate

    def touch(self) -> None:
        """Something that the snapshot shows has changed (time, for an ejection)."""
        self._candidate = None

    # Requests

    def start(self, piece: "Piece") -> engine_pb2.Start:
        """Puts a piece on its way. The caller fills the returned message before it yields."""
        self._next_id += 1
        piece.id = str(self._next_id)
        piece.replica = self
        self.pieces[piece.id] = piece
        self.in_flight += len(piece.indexes)
        self._sent_tokens += piece.uncached_tokens
        self._candidate = None
        start = self._outgoing.start.add()
        start.id = piece.id
        if self._checks_revision:
            start.revision = self.revision
        self._wake.set()
        return start

    def cancel(self, piece: "Piece", index: int | None = None) -> None:
        """Tells the engine that a piece, or one sample of it, is not wanted any more."""
        if self._connected:
            if index is None:
                self._outgoing.cancel.add(id=piece.id)
            else:
                self._outgoing.cancel.add(id=piece.id, index=index)
            self._wake.set()

    def release(self, piece: "Piece") -> None:
        """A sequence of a piece has ended, and is no index of it any more. The piece leaves with
        its last."""
        self.in_flight -= 1
        self._candidate = None
        if not piece.indexes:
            self.drop(piece)

    def drop(self, piece: "Piece") -> None:
        """A piece leaves with all sequences that it still has."""
        self.in_flight -= len(piece.indexes)
        self._candidate = None
        self.pieces.pop(piece.id, None)
        piece.replica = None
        if self._retired and not self.pieces:
            self._stop()

    def refuse(self) -> None:
        """It refused a request because it drains: nothing more goes there until its next load."""
        self._refusing = True

    # Life

    def open(self) -> None:
        """Starts connecting."""
        self._task = asyncio.create_task(self._run(), name=f"replica {self.name}")

    def follow(self, revision: str) -> None:
        """The table says that other weights were swapped in. New requests name the new revision
        as soon as the engine has said what it is; what flies there goes on."""
        self.wanted = revision
        if not self._connected:
            self.revision = revision
        self._turn.set()

    def retire(self) -> None:
        """Takes nothing new; ends once what flies there has ended."""
        self._retired = True
        if not self.pieces:
            self._stop()

    async def close(self) -> None:
        """Ends at once. Nothing is handed back."""
        self._retired = True
        self._stop()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _stop(self) -> None:
        self._connected = False
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        settings = self._settings
        pause = settings.first_pause
        while not self._retired:
            admissions = self._admissions
            try:
                await self._connection()
            except (_Ended, grpc.RpcError, OSError) as error:
                level = logging.WARNING if self._admissions > admissions else logging.DEBUG
                log.log(level, "replica %s at %s: %s", self.name, self.address, _why(error))
            except Exception:
                log.exception("replica %s at %s: connecting again", self.name, self.address)
            if self._admissions > admissions:
                pause = settings.first_pause
            await asyncio.sleep(pause * self._rng.uniform(0.8, 1.2))
            # One that was never reached may be gone for good; one that was may be back any moment.
            longest = settings.longest_pause * (1 if self._admissions else _NEVER_REACHED)
            pause = min(longest, pause * 1.5)

    async def _connection(self) -> None:
        """One connection from dialling to its end, which always raises."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            revision = self.wanted
            model, key = await self._model(stub, revision)
            call = stub.Generate()  # type: ignore[call-arg]  # the stub has no default for it
            self._connect(model, key, revision)
            jobs = (
                self._follow(stub),
                self._read(call),
                self._write(call),
                self._watch_cache(stub),
                self._watch_health(channel),
            )
            try:
                await _first_failure(jobs)
            finally:
                # Before the slower farewells of stream and channel: pieces fly on at once.
                self._disconnect()
                call.cancel()

    async def _model(
        self, stub: "engine_pb2_grpc.EngineAsyncStub", revision: str
    ) -> tuple[engine_pb2.Model, str]:
        """What the engine says of this revision, and its text key."""
        model = await stub.GetModel(
            engine_pb2.GetModelRequest(revision=revision), timeout=self._settings.connect_timeout
        )
        if model.revision and model.revision != revision:
            raise _Ended(f"it serves revision {model.revision}, not {revision}")
        return model, await asyncio.to_thread(text_key, model)

    async def _follow(self, stub: "engine_pb2_grpc.EngineAsyncStub") -> None:
        """Goes with the table from one revision to another. An engine that does not answer, or
        lacks the new one and then gets nothing new, keeps its streams and is asked again."""
        while True:
            while (revision := self.wanted) == self.revision:
                await self._turn.wait()
                self._turn.clear()
            try:
                model, key = await self._model(stub, revision)
            except (_Ended, grpc.RpcError) as error:
                if not self._behind:
                    log.warning("replica %s: not yet %s: %s", self.name, revision, _why(error))
                self._behind = self._behind or isinstance(error, _Ended)
                await asyncio.sleep(self._settings.longest_pause)
                continue
            self._adopt(model, key, revision)
            log.info("replica %s: its weights were swapped to %s", self.name, revision)
            self._events.turned(self, model)

    def _adopt(self, model: engine_pb2.Model, key: str, revision: str) -> None:
        self.revision = revision
        self._behind = False
        self.text_key = key
        self.hash_seed = model.hash_seed
        self.startup = tuple(model.startup)
        self.block_size = max(1, model.block_size)
        self._slots = max(1, model.max_num_seqs)
        self._checks_revision = bool(model.revision)
        self._candidate = None

    def _connect(self, model: engine_pb2.Model, key: str, revision: str) -> None:
        self._adopt(model, key, revision)
        self.load = engine_pb2.Load(blocks_total=model.num_blocks)
        self._refusing = False
        self._sent_tokens = 0
        self._outgoing = engine_pb2.GenerateRequest()
        self._wake.clear()
        self._heard_at = self._clock()
        self._connected = True
        self._admissions += 1
        log.info("replica %s at %s: admitted (%s)", self.name, self.address, self.revision)
        self._events.admitted(self, model)

    def _disconnect(self) -> None:
        self._connected = False
        pieces, self.pieces = list(self.pieces.values()), {}
        self.in_flight = 0
        self._candidate = None
        for piece in pieces:
            piece.replica = None
        self._events.lost(self, pieces)

    async def _read(self, call: "Call") -> None:
        while True:
            batch = await call.read()
            if not isinstance(batch, engine_pb2.GenerateBatch):  # grpc.aio.EOF
                raise _Ended("the engine ended the stream")
            self._heard_at = self._clock()
            if batch.HasField("load"):
                self.load = batch.load
                self._refusing = batch.load.draining
                self._sent_tokens = 0
                self._candidate = None
            self._events.batch(self, batch)

    async def _write(self, call: "Call") -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            message, self._outgoing = self._outgoing, engine_pb2.GenerateRequest()
            await call.write(message)

    async def _watch_cache(self, stub: "engine_pb2_grpc.EngineAsyncStub") -> None:
        """Keeps the cache's events coming; an engine without them is served all the same."""
        while True:
            try:
                async for events in stub.WatchCache(engine_pb2.WatchCacheRequest()):
                    self._events.cache(self, events)
            except grpc.RpcError as error:
                log.debug("replica %s: no cache events: %s", self.name, _why(error))
            self._events.cache(self, engine_pb2.CacheEvents(reset=True))
            await asyncio.sleep(self._settings.longest_pause)

    async def _watch_health(self, channel: grpc.aio.Channel) -> None:
        settings = self._settings
        stub = health_pb2_grpc.HealthStub(channel)
        asked_at = 0.0
        while True:
            await asyncio.sleep(settings.silence / 5)
            now = self._clock()
            if now - max(self._heard_at, asked_at) < settings.silence:
                continue
            asked_at = now
            try:
                answer = await stub.Check(
                    health_pb2.HealthCheckRequest(service="live"), timeout=settings.health_timeout
                )
            except grpc.aio.AioRpcError as error:
                if error.code() in ANSWERED:
                    continue
                raise _Ended(f"silent, and its health check failed: {_why(error)}") from error
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise _Ended("silent, and not healthy by its own account")


Call = grpc.aio.StreamStreamCall[engine_pb2.GenerateRequest, engine_pb2.GenerateBatch]


async def _first_failure(jobs: tuple[Coroutine[Any, Any, None], ...]) -> None:
    """Runs jobs that never return; raises what the first of them raises and ends the others."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def text_key(model: engine_pb2.Model) -> str:
    """Names everything that turns text into token ids: equal keys, equal ids."""
    return blake2b(
        model.tokenizer.SerializeToString(deterministic=True), digest_size=16
    ).hexdigest()


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
