"""HTTP/1.1 for uvicorn with deadlines: what happens below ASGI, where a handler cannot see.

A connection that sends no request, sends its headers slowly or does not read its response ends
after a bound, and a request that is not HTTP is answered in OpenAI's shape. Handlers learn of a
client that hangs up by a call: a task for every request that waits for it would cost a tenth of
the router's time.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal.router.http.client import STATE_KEY, Client
from shoal.router.http.errors import ApiError

HEADER_SECONDS = 30.0  # from the connection, or a request's first byte, to the end of the headers
HEADER_BYTES = 64 * 1024
STALL_SECONDS = 60.0  # that a client may leave its response unread


class CycleWire:
    """The `Wire` of one of uvicorn's request-response cycles. Most of a stream's many small
    pieces meet no slow client, and cost a third less without a message, a coroutine and a task's
    wake-up each; a head that we wrote ourselves needs no search for what must not be in it."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def begin(self, headers: bytes, piece: bytes, *, more: bool) -> bool:
        cycle = self._cycle
        if cycle.response_started or cycle.flow.write_paused or cycle.disconnected:
            return False
        cycle.response_started = cycle.chunked_encoding = True
        cycle.waiting_for_100_continue = False
        closing = b"" if cycle.keep_alive else b"connection: close\r\n"
        head = b"HTTP/1.1 200 OK\r\n%b%btransfer-encoding: chunked\r\n\r\n" % (headers, closing)
        self._put(head, piece, more)
        return True

    def write(self, piece: bytes, *, more: bool) -> bool:
        cycle = self._cycle
        if cycle.flow.write_paused or not cycle.chunked_encoding or cycle.disconnected:
            return False
        self._put(b"", piece, more)
        return True

    def _put(self, head: bytes, piece: bytes, more: bool) -> None:
        cycle = self._cycle
        chunk = b"%b%x\r\n%b\r\n" if more else b"%b%x\r\n%b\r\n0\r\n\r\n"
        cycle.transport.write(chunk % (head, len(piece), piece))
        if not more:
            cycle.response_complete = True
            cycle.message_event.set()
            if not cycle.keep_alive:
                cycle.transport.close()
            cycle.on_response()


class HttpProtocol(HttpToolsProtocol):
    """One connection. Pass it to uvicorn as `http=HttpProtocol`."""

    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_headers = False  # a request has begun and its headers are not complete
    _clients: tuple[Client, ...] = ()  # of the requests that may still be under way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)
        for client in self._clients:
            client.hung_up()

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse(431, f"the request's headers have more than {HEADER_BYTES} bytes")
                return
        super().data_received(data)
        # Headers that arrive whole, as nearly all do, need no timer.
        if self._in_headers and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._header_bytes = 0
        client = Client()
        self.scope["state"][STATE_KEY] = client
        unfinished = self._clients if self.pipeline else self._clients[-1:]
        self._clients = (*unfinished, client)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()
        if self.cycle is not None:
            self._clients[-1].wire = CycleWire(self.cycle)

    def on_message_complete(self) -> None:
        self._clients[-1].body_complete = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, f"the request is not valid HTTP/1.1 ({msg.rstrip('.')})")

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if self._in_headers:
            message = f"the headers did not arrive within {HEADER_SECONDS:g} s"
            self._refuse(408, message)
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answers without a handler, and closes."""
        reasons = {400: b"Bad Request", 408: b"Request Timeout"}
        body = ApiError(status, message).body()
        self._stop_timers()
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b"
            % (status, reasons.get(status, b"Request Header Fields Too Large"), len(body), body)
        )
        self.transport.close()

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._stall_timer = None
