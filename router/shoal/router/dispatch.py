"""The life of a service's requests: queued, sent, answered, sent again.

A generation travels as pieces: one piece a request at first, which holds all its samples, and one
a sample once they have to be continued on another replica. A piece is either in the queue or on a
replica. Everything happens in callbacks on one event loop: no task a request.

When a replica is lost its pieces go to the front of the queue and on to other replicas, with the
generated ids behind the prompt, the same seed and sample index, and what is left of the token
limits. Draws are keyed by (seed, sample, position), so the continuation is exact, and the router
draws a seed where the client gave none. `max_retries` bounds this before the first token,
`migration_limit` after it; a replica that merely refuses (it drains) costs neither: only one that
answers UNAVAILABLE after tokens of its own counts as failed.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.api.routes import RouteTable
from shoal.api.v1 import engine_pb2
from shoal.router import refusals
from shoal.router.generation import Generation, GenerationError, GenerationRequest, Output
from shoal.router.load import ServiceStats
from shoal.router.pick import share_of
from shoal.router.piece import Piece
from shoal.router.queue import FairQueue, Ticket, retry_after
from shoal.router.replica import Replica, ReplicaSettings
from shoal.router.selection import Lane, Selection

LENGTH = engine_pb2.FINISH_REASON_LENGTH
ERROR = engine_pb2.FINISH_REASON_ERROR
Code = engine_pb2.Error


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    replica: ReplicaSettings = field(default_factory=ReplicaSettings)
    load_limit_seconds: float = 0.5  # see shoal.router.pick


class Dispatcher:
    """One service: its replicas, queue, prefix index and figures."""

    def __init__(
        self,
        table: RouteTable,
        settings: DispatchSettings,
        clock: Callable[[], float],
        rng: random.Random,
        on_model: Callable[["Dispatcher", str, str, engine_pb2.Model], None],
    ) -> None:
        self.table = table
        self.queue: FairQueue[Piece, Lane] = FairQueue()
        self.replicas: dict[str, Replica] = {}
        self.stats = ServiceStats(clock())
        self.selection = Selection(settings.load_limit_seconds, rng, self.stats.route)
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._on_model = on_model
        self._retiring: set[Replica] = set()
        self._closed = False

    # The route table

    def apply(self, table: RouteTable) -> None:
        """Makes the replicas those of the table. What flies on others ends there."""
        self.table = table
        wanted = {endpoint.name: endpoint for endpoint in table.endpoints}
        for name, replica in list(self.replicas.items()):
            endpoint = wanted.get(name)
            if endpoint is None or endpoint.address != replica.address:
                del self.replicas[name]
                self.selection.index.discard(name)
                if replica.pieces:
                    self._retiring.add(replica)
                replica.retire()
            else:
                replica.draining = endpoint.draining
                if endpoint.revision != replica.wanted:
                    replica.follow(endpoint.revision)
        for name, endpoint in wanted.items():
            if name not in self.replicas:
                replica = Replica(endpoint, self, self._settings.replica, self._clock, self._rng)
                self.replicas[name] = replica
                replica.open()
        self._reconsider()

    async def close(self, error: GenerationError) -> None:
        """Fails what is unfinished and ends all connections."""
        self._closed = True
        replicas = [*self.replicas.values(), *self._retiring]
        for ticket in list(self.queue):
            self._fail(ticket.item.generation, error)
        for replica in replicas:
            for piece in list(replica.pieces.values()):
                self._fail(piece.generation, error)
        for replica in replicas:
            await replica.close()
        self.replicas.clear()
        self._retiring.clear()

    # Requests

    def submit(self, request: GenerationRequest, text_key: str) -> Generation:
        """Sends the request, or queues it. GenerationError where it can never be served, or
        where the queue is full."""
        now = self._clock()
        self.stats.arrivals += 1
        self.stats.last_activity = now
        revision = request.revision
        if revision is not None and all(r.revision != revision for r in self.table.endpoints):
            self.stats.refused("revision", 404)
            raise refusals.no_revision(self.table.service, revision)
        if not request.sampling.HasField("seed"):
            request.sampling.seed = self._rng.getrandbits(63)
        generation = Generation(request, self, now)
        who = request.session or request.tenant  # who comes again meets the same revision
        share = share_of(who) if who else self._rng.random()
        piece = Piece(generation, list(range(request.n)), share, text_key)
        generation.pieces.append(piece)
        replica = None
        if not len(self.queue):
            replica = self.selection.choose(piece, self.selection.lane(piece), self.replicas)
        if replica is not None:
            self.stats.open += 1
            self._send(piece, replica, now, 0.0)
            return generation
        if len(self.queue) >= self.table.max_queued:
            self.stats.refused("queue_full", 429)
            raise refusals.queue_full(
                self.table.service, len(self.queue), self.table.max_queued, self.retry_after()
            )
        self.stats.open += 1
        self._enqueue(piece, now)
        self.pump()
        return generation

    def cancel(self, generation: Generation, index: int | None) -> None:
        """See `Generation.cancel`, which calls this."""
        for piece in list(generation.pieces):
            if index is not None and index not in piece.indexes:
                continue
            if index is None or piece.indexes == [index]:
                self._drop(piece)
            else:
                self._drop_sample(piece, index)
        if index is None:
            self._end(generation, 499)
        elif not generation.unfinished:
            self._end(generation, 200)
        self.pump()

    def retry_after(self) -> float:
        return retry_after(len(self.queue), self.stats.starts_per_second)

    def tick(self, now: float) -> None:
        """Several times a second: deadlines, ejections that end, averages."""
        for ticket in self.queue.expire(now):
            generation = ticket.item.generation
            error = self._expired(generation, now - generation.arrived_at)
            self.stats.rejected[error.code] += 1
            self._fail(generation, error)
        for replica in self.replicas.values():
            replica.touch()
        self.stats.tick(now)
        self._reconsider()

    # Events of replicas

    def admitted(self, replica: Replica, model: engine_pb2.Model) -> None:
        if self.replicas.get(replica.name) is replica:
            self.selection.index.add(replica.name, model.num_blocks)
            self._on_model(self, replica.revision, replica.text_key, model)
            self._reconsider()

    def turned(self, replica: Replica, model: engine_pb2.Model) -> None:
        if self.replicas.get(replica.name) is replica:
            self._on_model(self, replica.revision, replica.text_key, model)
            self._reconsider()

    def lost(self, replica: Replica, pieces: Sequence[Piece]) -> None:
        self._retiring.discard(replica)
        if self.replicas.get(replica.name) is replica:
            self.selection.index.discard(replica.name)
        if pieces:
            replica.outlier.failed(self._clock())
        if self._closed:
            return
        for piece in pieces:
            self._again(piece, replica, "its replica was lost")
        self._reconsider()

    def cache(self, replica: Replica, events: engine_pb2.CacheEvents) -> None:
        if not replica.connected or self.replicas.get(replica.name) is not replica:
            return
        if events.reset:
            self.selection.index.reset(replica.name)
        self.selection.index.removed(replica.name, events.removed)
        self.selection.index.stored(replica.name, events.stored)

    def batch(self, replica: Replica, batch: engine_pb2.GenerateBatch) -> None:
        now = self._clock()
        pieces = replica.pieces
        revision = replica.revision
        stats = self.stats.of(revision)
        for delta in batch.deltas:
            piece = pieces.get(delta.id)
            index = delta.index
            if piece is None or index not in piece.indexes:
                continue  # cancelled here, or nothing of ours
            finish = delta.finish_reason
            if finish > LENGTH:
                self._broken(replica, piece, delta)
                continue
            generation = piece.generation
            sample = generation.samples[index]
            token_ids = list(delta.token_ids)
            count = len(token_ids)
            output = Output(index, token_ids)
            if not sample.generated:
                sample.cached_tokens = max(sample.cached_tokens, delta.cached_tokens)
                if delta.revision:
                    generation.revision = delta.revision
                if delta.prompt_logprobs:
                    output.prompt_logprobs = list(delta.prompt_logprobs)
            output.cached_tokens = sample.cached_tokens
            if piece.wants_logprobs:
                output.logprobs = list(delta.logprobs)
            if count:
                if generation.revision != revision:  # begun before its weights were swapped
                    revision = generation.revision
                    stats = self.stats.of(revision)
                if not generation.first_at:
                    generation.first_at = now
                    stats.ttft.add(now - generation.arrived_at)
                elif sample.last_at:
                    stats.itl.add((now - sample.last_at) / count, count)
                sample.last_at = now
                sample.generated += token_ids
            elif not finish and output.prompt_logprobs is None:
                continue
            output.finish = finish
            generation.deliver(output)
            if finish:
                piece.indexes.remove(index)
                replica.release(piece)
                replica.outlier.succeeded()
                if not piece.indexes:
                    generation.pieces.remove(piece)
                if not generation.unfinished:
                    self._end(generation, 200)
        if len(self.queue):
            self.pump()

    def _broken(self, replica: Replica, piece: Piece, delta: engine_pb2.Delta) -> None:
        """A replica ended a sample without an answer."""
        code, message = delta.error.code, delta.error.message
        if code == Code.INVALID_ARGUMENT:
            field_name = delta.error.field or None
            error = GenerationError(400, "invalid_request", message, field=field_name)
            self._fail(piece.generation, error)
        elif code == Code.DEADLINE_EXCEEDED:
            self._fail(piece.generation, GenerationError(408, "timeout", message))
        elif code == Code.UNAVAILABLE:
            replica.refuse()
            self._again(piece, replica, message, free=not piece.progressed)
        else:
            if delta.finish_reason == ERROR:
                replica.outlier.failed(self._clock())
            self._again(piece, replica, message or "the replica gave it up")

    # Ways between queue and replicas

    def pump(self) -> None:
        """Sends what is queued for as long as some replica has room for it."""
        if not len(self.queue):
            return
        now = self._clock()
        for lane in self.queue.lanes():
            while (ticket := self.queue.peek(lane)) is not None:
                replica = self.selection.choose(ticket.item, lane, self.replicas)
                if replica is None:
                    break
                self.queue.take(lane)
                self._send(ticket.item, replica, now, now - ticket.since)

    def _send(self, piece: Piece, replica: Replica, now: float, queued: float) -> None:
        generation = piece.generation
        generation.revision, generation.endpoint = replica.revision, replica.name
        piece.ticket = None
        piece.fill(replica.start(piece), now)
        self.stats.started(queued)

    def _enqueue(self, piece: Piece, now: float, *, front: bool = False) -> None:
        request = piece.generation.request
        deadline = now + self.table.queue_timeout_seconds
        if request.timeout_seconds is not None:
            deadline = min(deadline, piece.generation.arrived_at + request.timeout_seconds)
        piece.ticket = Ticket(
            piece,
            since=now,
            deadline=deadline,
            lane=self.selection.lane(piece),
            priority=request.priority,
            tenant=request.tenant,
            cost=float(len(request.token_ids) + request.sampling.max_tokens),
            front=front,
        )
        self.queue.push(piece.ticket)

    def _again(self, piece: Piece, replica: Replica, why: str, *, free: bool = False) -> None:
        """A replica did not finish a piece: queue it for another, or give up."""
        generation = piece.generation
        self._detach(piece)
        if generation.settled:
            return
        begun = piece.begun
        if not free:
            self.stats.of(generation.revision).broken += 1
            piece.failed_on |= {replica.name}
            piece.migrations += begun
            piece.retries += not begun
        table = self.table
        if piece.migrations > table.migration_limit or piece.retries > table.max_retries:
            limit = "migrationLimit" if begun else "maxRetries"
            number = table.migration_limit if begun else table.max_retries
            message = f"the request failed on {replica.name}: {why} ({limit} is {number})"
            self._fail(generation, GenerationError(502, "replica_failed", message))
            return
        if begun:
            self.stats.migrations += 1
        else:
            self.stats.retries += 1
        self._requeue(piece)

    def _requeue(self, piece: Piece) -> None:
        """Puts a piece at the front, in parts where one Start cannot say it all any more."""
        if piece.ticket is not None:
            self.queue.remove(piece.ticket)
        now = self._clock()
        for part in piece.split():
            self._enqueue(part, now, front=True)

    def _detach(self, piece: Piece) -> None:
        """Takes a piece out of the queue or off its replica; its samples stay unfinished."""
        if piece.replica is not None:
            piece.replica.cancel(piece)
            piece.replica.drop(piece)
        elif piece.ticket is not None:
            self.queue.remove(piece.ticket)
            piece.ticket = None

    def _drop(self, piece: Piece) -> None:
        """Nobody wants any sample of it."""
        self._detach(piece)
        piece.generation.pieces.remove(piece)

    def _drop_sample(self, piece: Piece, index: int) -> None:
        """Nobody wants this sample; it has others."""
        piece.indexes.remove(index)
        if piece.replica is not None:
            piece.replica.cancel(piece, index)
            piece.replica.release(piece)
        else:
            self._requeue(piece)

    # Ends

    def _fail(self, generation: Generation, error: GenerationError) -> None:
        if generation.settled:
            return
        for piece in list(generation.pieces):
            self._drop(piece)
        generation.fail(error)
        self._end(generation, error.status)

    def _end(self, generation: Generation, status: int) -> None:
        now = self._clock()
        self.stats.ended(generation.revision, status, now - generation.arrived_at, now)

    def _expired(self, generation: Generation, waited: float) -> GenerationError:
        table, timeout = self.table, generation.request.timeout_seconds
        if timeout is not None and waited >= timeout:
            return refusals.timed_out(table.service, waited, timeout, self.retry_after())
        available = any(replica.available for replica in self.replicas.values())
        refusal = refusals.no_room if available else refusals.no_replica
        return refusal(table.service, table.queue_timeout_seconds, self.retry_after())

    def _reconsider(self) -> None:
        """Replicas may have come or gone: shares what waits anew, and sends what can go."""
        if self.selection.refresh(self.table, self.replicas.values()):
            for ticket in self.queue.drain():
                ticket.item.ticket = moved = ticket.moved(self.selection.lane(ticket.item))
                self.queue.push(moved)
        self.pump()
