"""One HTTP exchange over raw ASGI: the request's body in, one response out."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.router.generation import Generation
from shoal.router.http.client import STATE_KEY, Client
from shoal.router.http.errors import ApiError, Headers

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]

_CLOSE = ((b"connection", b"close"),)
JSON: Headers = [(b"content-type", b"application/json")]


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Bounds on what a client may ask of the HTTP front."""

    max_body_bytes: int = 10 * 1024 * 1024
    body_timeout_seconds: float = 30.0  # from the end of the headers to the end of the body
    model_timeout_seconds: float | None = None  # wait for a first replica; None: the core's own


class Exchange:
    """A request and its response. Exactly one of `respond` and `start` is called."""

    __slots__ = (
        "_client",
        "_generations",
        "_headers",
        "_receive",
        "_send",
        "_settings",
        "_waiting",
        "request_id",
        "scope",
        "started",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, settings: HttpSettings, request_id: bytes
    ) -> None:
        self.scope = scope
        self.request_id = request_id
        self.started = False  # the response's headers are out
        self._generations: Sequence[Generation] = ()
        self._headers: dict[bytes, bytes] | None = None
        self._receive = receive
        self._send = send
        self._settings = settings
        self._waiting: asyncio.Task[Any] | None = None  # the handler, while it may be given up
        # A server without `HttpProtocol` tells nobody: its clients' requests run to their end.
        self._client: Client = scope.get("state", {}).get(STATE_KEY) or Client()
        self._client.on_gone = self._hung_up

    @property
    def gone(self) -> bool:
        """The client hung up."""
        return self._client.gone

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    def header(self, name: bytes) -> bytes | None:
        """A request header by its name in lower case; of several the last."""
        if self._headers is None:
            self._headers = dict(self.scope["headers"])
        return self._headers.get(name)

    async def json_body(self) -> bytes:
        """The whole body, which must be declared as JSON.

        Raises ApiError: 415 another type, 413 too long, 408 too slow.
        """
        kind = (self.header(b"content-type") or b"").split(b";", 1)[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            named = kind.decode("latin-1") or "missing"
            raise ApiError(415, f"content-type is {named}, but must be application/json")
        limit = self._settings.max_body_bytes
        length = self.header(b"content-length")
        if length is not None and int(length) > limit:
            raise self._too_long(length.decode())
        seconds = self._settings.body_timeout_seconds
        if self._client.body_complete:
            return await self._read(limit)  # without a wait: a deadline would cost more than it
        try:
            async with asyncio.timeout(seconds):
                return await self._read(limit)
        except TimeoutError:
            message = f"the body did not arrive within {seconds:g} s"
            raise ApiError(408, message, headers=_CLOSE) from None

    async def _read(self, limit: int) -> bytes:
        message = await self._receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts = bytearray(body)
            while message.get("more_body"):
                message = await self._receive()
                parts += message.get("body", b"")
                if len(parts) > limit:
                    raise self._too_long(f"over {limit}")
            body = bytes(parts)
        if message["type"] == "http.disconnect":
            self._client.gone = True
            raise ApiError(408, "the client hung up before the body was complete")
        if len(body) > limit:
            raise self._too_long(str(len(body)))
        return body

    def _too_long(self, length: str) -> ApiError:
        limit = self._settings.max_body_bytes
        message = f"the body has {length} bytes, but must have at most {limit}"
        return ApiError(413, message, code="body_too_long", headers=_CLOSE)

    @contextlib.contextmanager
    def given_up_on_hangup(self) -> Iterator[None]:
        """What is awaited inside ends with ApiError once the client hangs up; for waits before
        there is a generation. Use from the exchange's own task."""
        if self.gone:
            raise ApiError(408, "the client hung up")
        task = self._waiting = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if not self.gone or task is None or task.uncancel():
                raise  # by somebody else
            raise ApiError(408, "the client hung up") from None
        finally:
            self._waiting = None

    def cancel_on_hangup(self, generations: Sequence[Generation]) -> None:
        """From now on a client that hangs up, or has hung up, cancels these."""
        self._generations = generations
        if self.gone:
            self._cancel()

    def _hung_up(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for generation in self._generations:
            generation.cancel()

    def close(self) -> None:
        """Nobody listens any more."""
        self._client.on_gone = None

    async def respond(self, status: int, body: bytes, headers: Headers) -> None:
        """Sends a whole response; `headers` without content-length."""
        await self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.send(b"" if self.method == "HEAD" else body, more=False)

    async def start(self, status: int, headers: Headers) -> None:
        """Begins a response whose body `send` brings in pieces."""
        self.started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"x-request-id", self.request_id)],
            }
        )

    async def begin(self, headers: Headers, piece: bytes, *, more: bool) -> None:
        """`start` with status 200, and the first piece of the body."""
        wire = self._client.wire
        if wire is not None and piece:
            lines = b"".join([b"%b: %b\r\n" % header for header in headers])
            whole = b"%bx-request-id: %b\r\n" % (lines, self.request_id)
            # A value with a line break would be a header of its own.
            if whole.count(b"\n") == len(headers) + 1 and wire.begin(whole, piece, more=more):
                self.started = True
                return
        await self.start(200, headers)
        if piece or not more:
            await self.send(piece, more=more)

    def write(self, piece: bytes, *, more: bool = True) -> bool:
        """Sends a piece of a body that has begun, without a wait. False, and nothing is sent,
        where that cannot be: then `send` does it."""
        wire = self._client.wire
        return self.started and wire is not None and wire.write(piece, more=more)

    def send(self, body: bytes, *, more: bool) -> Awaitable[None]:
        """One piece of the body. Waits while the client is slower than we are."""
        return self._send({"type": "http.response.body", "body": body, "more_body": more})
