"""An HTTP load generator that costs little: raw sockets, one kept-alive connection a stream.

It does not parse what it need not: a response is over when its chunked body ends, its first
token is the first piece of text that is not empty, and events are counted by their prefix.
"""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

END = b"0\r\n\r\n"
TEXT = re.compile(rb'"(?:content|text)": ?"[^"]')


@dataclass
class Result:
    """What one load run saw; seconds."""

    requests: int = 0
    chunks: int = 0
    failures: int = 0
    wall: float = 0.0
    first: list[float] = field(default_factory=list)  # request sent -> first event of content


class _Connection(asyncio.Protocol):
    """Sends the next request as soon as the last response is over, until told to stop."""

    def __init__(self, request: Callable[[], bytes | None], result: Result) -> None:
        self.request = request
        self.result = result
        self.done = asyncio.get_running_loop().create_future()
        self.sent = 0.0
        self.begun = False
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._next()

    def _next(self) -> None:
        request = self.request()
        if request is None:
            self.transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self.begun = False
        self.sent = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self.begun and TEXT.search(data):
            self.begun = True
            self.result.first.append(time.perf_counter() - self.sent)
        self.result.chunks += data.count(b"data: {")
        self.tail = (self.tail + data)[-len(END) :]
        if self.tail == END:
            self.tail = b""
            self.result.requests += 1
            if not self.begun:
                self.result.failures += 1
            self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.result.failures += 1
            self.done.set_result(None)


def http_request(path: str, body: bytes) -> bytes:
    """A kept-alive POST of a JSON body."""
    return (
        b"POST %s HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (path.encode(), len(body), body)
    )


async def run(
    port: int, requests: Callable[[int], bytes], *, streams: int, seconds: float
) -> Result:
    """Keeps `streams` requests in flight for `seconds`; `requests(i)` gives the i-th."""
    result = Result()
    start = time.perf_counter()
    count = 0

    def next_request() -> bytes | None:
        nonlocal count
        if time.perf_counter() - start > seconds:
            return None
        count += 1
        return requests(count)

    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(streams):
        _, connection = await loop.create_connection(
            lambda: _Connection(next_request, result), "127.0.0.1", port
        )
        connections.append(connection)
    await asyncio.wait_for(
        asyncio.gather(*(connection.done for connection in connections)), seconds + 60
    )
    result.wall = time.perf_counter() - start
    return result
