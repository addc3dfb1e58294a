"""Requests of many streams on one engine.

Every stream numbers its requests as it likes; the engine sees `<stream>/<id>`. A stream keeps
the sequences it still waits for, so that a client that hangs up frees all of them at once, and
one batch that collects what is new until the client has taken the one before.
"""

import asyncio
from collections.abc import Callable, Iterable
from itertools import count

from shoal.api.v1 import engine_pb2
from shoal.worker import wire
from shoal.worker.engine import EngineLoad
from shoal.worker.loop import Add, Cancel, Command, Rejection, Report
from shoal.worker.request import EngineRequest, InvalidRequest
from shoal.worker.validate import MAX_SAMPLES
from shoal.worker.weight_sets import RevisionGone


class Stream:
    """One `Generate` call. All methods run on the event loop."""

    def __init__(self, number: int, max_pending: int) -> None:
        self.number = number
        self.overrun = False  # the client fell too far behind
        self._max_pending = max_pending
        self.in_flight = 0  # sequences still to finish
        self._open: dict[str, set[int]] = {}  # request id -> their sample indices
        self._inputs_over = False
        self._batch = engine_pb2.GenerateBatch()
        self._has_news = False
        self._wake: asyncio.Future[None] | None = None

    @property
    def request_ids(self) -> list[str]:
        return list(self._open)

    async def next_batch(self) -> engine_pb2.GenerateBatch | None:
        """Everything new since the last call; None when the inputs have ended and all requests
        are finished, or when the client fell too far behind."""
        while not self._has_news:
            if self.overrun or (self._inputs_over and not self._open):
                return None
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        if self.overrun:
            return None
        batch, self._batch, self._has_news = self._batch, engine_pb2.GenerateBatch(), False
        return batch

    def end_inputs(self) -> None:
        """The client will send no more; what is in flight goes on."""
        self._inputs_over = True
        self._notify()

    def opened(self, request: EngineRequest, own_id: str) -> None:
        first = request.first_index
        self._open[own_id] = set(range(first, first + request.sampling.n))
        self.in_flight += request.sampling.n

    def knows(self, own_id: str) -> bool:
        return own_id in self._open

    def closed(self, own_id: str, index: int) -> None:
        indices = self._open.get(own_id)
        if indices is not None and index in indices:
            indices.remove(index)
            self.in_flight -= 1
            if not indices:
                del self._open[own_id]

    def fail(self, own_id: str, error: engine_pb2.Error) -> None:
        """Ends every open sequence of the request."""
        indices = sorted(self._open.pop(own_id, ()))
        self.in_flight -= len(indices)
        self.refuse(own_id, indices, error)

    def refuse(self, own_id: str, indices: Iterable[int], error: engine_pb2.Error) -> None:
        """Reports the end of sequences that never began, or whose engine is gone."""
        for index in indices:
            wire.add_error(self._batch, own_id, index, error)
        self.changed()

    @property
    def batch(self) -> engine_pb2.GenerateBatch:
        """Where new deltas go; call `changed` after adding some."""
        return self._batch

    def changed(self, load: engine_pb2.Load | None = None) -> None:
        if load is not None:
            self._batch.load.CopyFrom(load)
        self._has_news = True
        if len(self._batch.deltas) > self._max_pending:
            self.overrun = True
            self._batch = engine_pb2.GenerateBatch()
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class StreamHub:
    """All streams of a server: commands towards the engine, reports back to who asked."""

    def __init__(
        self,
        submit: Callable[[Command], None],
        idle_load: EngineLoad,
        max_pending: int,
    ) -> None:
        """A stream on which more than `max_pending` deltas wait for its client is ended."""
        self._submit = submit
        self._load = idle_load
        self._max_pending = max_pending
        self._numbers = count(1)
        self._streams: dict[str, Stream] = {}
        self._dead: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def in_flight(self) -> int:
        """Sequences that clients still wait for."""
        return sum(stream.in_flight for stream in self._streams.values())

    def open(self) -> Stream:
        stream = Stream(next(self._numbers), self._max_pending)
        self._streams[str(stream.number)] = stream
        stream.changed(self._load_message())
        return stream

    def close(self, stream: Stream) -> None:
        """The client is gone or has all it wanted: what is left of its requests is cancelled."""
        self._streams.pop(str(stream.number), None)
        for own_id in stream.request_ids:
            self._submit(Cancel(f"{stream.number}/{own_id}"))
        self._settle()

    def start(self, stream: Stream, start: engine_pb2.Start) -> None:
        """Hands a request to the engine, or refuses it with a delta of its own."""
        error = self._objection(stream, start)
        if error is None:
            try:
                request = wire.request_of(start, f"{stream.number}/{start.id}")
            except InvalidRequest as invalid:
                error = _invalid(invalid)
            else:
                stream.opened(request, start.id)
                self._idle.clear()
                self._submit(Add(request))
                return
        samples = min(max(start.n, 1), MAX_SAMPLES)
        first = min(start.sample_index, wire.MAX_SAMPLE_INDEX)
        stream.refuse(start.id, range(first, first + samples), error)

    def cancel(self, stream: Stream, cancel: engine_pb2.Cancel) -> None:
        index = cancel.index if cancel.HasField("index") else None
        self._submit(Cancel(f"{stream.number}/{cancel.id}", index))

    def take(self, report: Report) -> None:
        """Spreads a report over the streams: one batch each, with the load."""
        self._load = report.load
        touched: dict[str, Stream] = {}
        for rejection in report.rejections:
            self._reject(rejection, touched)
        for delta in report.output.deltas if report.output else ():
            number, _, own_id = delta.key.request_id.partition("/")
            stream = self._streams.get(number)
            if stream is None or not stream.knows(own_id):
                continue
            touched[number] = stream
            wire.add_delta(stream.batch, own_id, delta)
            if delta.finish is not None:
                stream.closed(own_id, delta.key.index)
        if touched:
            load = self._load_message()
            for stream in touched.values():
                stream.changed(load)
            self._settle()

    def beat(self) -> None:
        """Tells every stream that the engine lives, and how busy it is."""
        load = self._load_message()
        for stream in self._streams.values():
            stream.changed(load)

    def die(self, reason: str) -> None:
        """The engine is gone: every request ends, and new ones are refused. One of those that
        were in it may be the cause, so they do not count as merely refused."""
        self._dead = reason
        error = engine_pb2.Error(code=engine_pb2.Error.INTERNAL, message=reason)
        for stream in self._streams.values():
            for own_id in stream.request_ids:
                stream.fail(own_id, error)
        self._settle()

    async def drained(self, deadline_seconds: float) -> int:
        """Waits for the requests in flight; returns how many sequences are left at the deadline."""
        try:
            async with asyncio.timeout(deadline_seconds):
                await self._idle.wait()
        except TimeoutError:
            pass
        return self.in_flight

    def _objection(self, stream: Stream, start: engine_pb2.Start) -> engine_pb2.Error | None:
        if self._dead is not None:
            return engine_pb2.Error(code=engine_pb2.Error.UNAVAILABLE, message=self._dead)
        if self.draining:
            return engine_pb2.Error(
                code=engine_pb2.Error.UNAVAILABLE, message="this replica is draining"
            )
        if not start.id or stream.knows(start.id):
            return engine_pb2.Error(
                code=engine_pb2.Error.INVALID_ARGUMENT,
                message=f"id {start.id!r} must be non-empty and not in flight on this stream",
                field="id",
            )
        return None

    def _reject(self, rejection: Rejection, touched: dict[str, Stream]) -> None:
        number, _, own_id = rejection.request_id.partition("/")
        stream = self._streams.get(number)
        if stream is None:
            return
        touched[number] = stream
        if isinstance(rejection.error, InvalidRequest):
            stream.fail(own_id, _invalid(rejection.error))
        elif isinstance(rejection.error, RevisionGone):
            error = engine_pb2.Error(
                code=engine_pb2.Error.UNAVAILABLE, message=str(rejection.error), field="revision"
            )
            stream.fail(own_id, error)
        else:
            message = f"{type(rejection.error).__name__}: {rejection.error}"
            stream.fail(own_id, engine_pb2.Error(code=engine_pb2.Error.INTERNAL, message=message))

    def _load_message(self) -> engine_pb2.Load:
        return wire.load_message(self._load, self.draining)

    def _settle(self) -> None:
        if self.in_flight == 0:
            self._idle.set()


def _invalid(error: InvalidRequest) -> engine_pb2.Error:
    return engine_pb2.Error(
        code=engine_pb2.Error.INVALID_ARGUMENT, message=str(error), field=error.field
    )
