"""What a connection knows about the client of one request, for the request's handler."""

from collections.abc import Callable

STATE_KEY = "shoal.client"  # in the state of the request's ASGI scope


class Client:
    """The connection writes, the exchange reads and listens."""

    __slots__ = ("body_complete", "gone", "on_gone")

    def __init__(self) -> None:
        self.body_complete = False  # all of the request has arrived
        self.gone = False  # it hung up
        self.on_gone: Callable[[], None] | None = None

    def hung_up(self) -> None:
        """Tells the listener, if there is one."""
        self.gone = True
        if self.on_gone is not None:
            self.on_gone()
