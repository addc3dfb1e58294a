"""What a connection knows about the client of one request, for the request's handler."""

from collections.abc import Callable
from typing import Protocol

STATE_KEY = "shoal.client"  # in the state of the request's ASGI scope


class Wire(Protocol):
    """Where a response goes, below ASGI. What it cannot do it refuses: False, nothing is sent,
    and ASGI's `send`, which can wait for a client that reads slowly, has to do it."""

    def begin(self, headers: bytes, piece: bytes, *, more: bool) -> bool:
        """Sends, at once, the head of a chunked response of status 200 and its first piece.
        `headers`: lines that end with CR LF."""

    def write(self, piece: bytes, *, more: bool) -> bool:
        """Sends, at once, a piece of a chunked response that has begun."""


class Client:
    """The connection writes, the exchange reads and listens."""

    __slots__ = ("body_complete", "gone", "on_gone", "wire")

    def __init__(self) -> None:
        self.body_complete = False  # all of the request has arrived
        self.gone = False  # it hung up
        self.on_gone: Callable[[], None] | None = None
        self.wire: Wire | None = None  # None: a server that has no such thing

    def hung_up(self) -> None:
        """Tells the listener, if there is one."""
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()
