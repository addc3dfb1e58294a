"""Frames over a TCP connection: a length of 4 bytes, then so many bytes. Blocking.

A step's plan takes tens of microseconds this way, a remote call of a framework a millisecond.
"""

import socket
import struct
from contextlib import suppress
from typing import Final

_LENGTH: Final = struct.Struct(">I")
LONGEST_FRAME: Final = 1 << 28


class ChannelClosed(ConnectionError):
    """The other end hung up, or does not speak in frames."""


class Channel:
    """One end of an authenticated connection. One thread sends, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._buffer = bytearray(1 << 16)

    def send(self, body: bytes) -> None:
        """Raises ChannelClosed, TimeoutError."""
        try:
            self._connection.sendall(_LENGTH.pack(len(body)) + body)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(f"the other end hung up: {error}") from error

    def receive(self, seconds: float | None = None) -> bytes:
        """The next frame; waits at most so long for each part of it. Raises ChannelClosed,
        TimeoutError."""
        self._connection.settimeout(seconds)
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > LONGEST_FRAME:
            raise ChannelClosed(f"a frame of {length} bytes, at most {LONGEST_FRAME} are expected")
        return self._exactly(length)

    def _exactly(self, size: int) -> bytes:
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        have = 0
        while have < size:
            try:
                count = self._connection.recv_into(view[have:])
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelClosed(f"the other end hung up: {error}") from error
            if not count:
                raise ChannelClosed("the other end hung up")
            have += count
        return bytes(view)

    def close(self) -> None:
        """Ends both directions: who waits on this connection, in whatever thread, wakes up.
        Idempotent."""
        with suppress(OSError):  # it is closed already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
