"""Heartbeats between a group's driver and its ranks, beside the plans and apart from them.

Each rank dials the driver's pulse port, and both say a word every quarter of a second from a
thread of their own, so that a step, however long, is no silence. The driver's `Watch` names the
first rank that leaves, fails or falls silent; a rank whose driver does ends its process at once,
whatever its other threads wait for: a collective that waits for a dead peer ends no other way.

Frames are a length of 4 bytes, then msgpack; the connection is authenticated (`auth`).
"""

import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from shoal.worker.parallel.auth import AuthError, admit, introduce
from shoal.worker.parallel.vitals import Loss, Patience, Vitals

BEAT_SECONDS: Final = 0.25
DRIVER_SILENCE_SECONDS: Final = 2.0
ORPHANED: Final = 17  # exit code of a rank that lost its driver
_CONNECT_SECONDS: Final = 10.0
_LENGTH: Final = struct.Struct(">I")
_LONGEST_FRAME: Final = 1 << 16
_FIRST_PHASE: Final = "starting"


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank's first word: who it is, and what must be the same on all ranks."""

    rank: int
    host: str
    pid: int
    same: Mapping[str, str]  # e.g. versions of what computes, digest of the model


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank has come: `41 % of weights` is share 0.41 of what "weights"."""

    rank: int
    host: str
    phase: str
    what: str
    share: float | None


class Pulse:
    """A rank's end. Used by any thread of the rank; `start` before anything slow."""

    def __init__(
        self,
        address: tuple[str, int],
        key: bytes,
        hello: Hello,
        *,
        silence_seconds: float = DRIVER_SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        """`end` is called with ORPHANED when the driver is gone, on the pulse's thread."""
        self._silence = silence_seconds
        self._clock = clock
        self._end = end
        self._said: dict[str, Any] = {"phase": _FIRST_PHASE, "what": "", "share": None}
        self._changed = threading.Event()
        self._over = threading.Event()
        self._sending = threading.Lock()
        self._connection = socket.create_connection(address, _CONNECT_SECONDS)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        introduce(self._connection, key)
        same = dict(hello.same)
        self._send({"rank": hello.rank, "host": hello.host, "pid": hello.pid, "same": same})
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def say(self, phase: str, what: str = "", share: float | None = None) -> None:
        """What this rank is at; goes out with the next beat, a new phase at once."""
        new = phase != self._said["phase"]
        self._said = {"phase": phase, "what": what, "share": share}
        if new:
            self._changed.set()

    def fail(self, why: str) -> None:
        """This rank's last word: why its process ends. The driver learns it at once."""
        self._over.set()
        with suppress(OSError):
            self._send({"failed": why})

    def close(self) -> None:
        """The end of the rank's work was asked for; the driver's silence means nothing more."""
        self._over.set()
        self._changed.set()
        with suppress(OSError):
            self._connection.close()

    def _run(self) -> None:
        listener = threading.Thread(target=self._listen, name="pulse-ears", daemon=True)
        listener.start()
        while not self._over.is_set():
            try:
                self._send(dict(self._said))
            except OSError:
                self._orphaned()
                return
            self._changed.wait(BEAT_SECONDS)
            self._changed.clear()

    def _listen(self) -> None:
        self._connection.settimeout(self._silence)
        try:
            while self._connection.recv(4096):
                pass
        except OSError:  # silent for too long, or reset
            pass
        self._orphaned()

    def _orphaned(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._end(ORPHANED)

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            self._connection.sendall(frame(message))


class Watch:
    """The driver's end: listens for the ranks of one group and says which of them is lost."""

    def __init__(
        self,
        world: int,
        key: bytes,
        on_loss: Callable[[Loss], None],
        *,
        host: str = "127.0.0.1",
        patience: Patience | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listens on a free port of `host` from now on. `on_loss` is called once, on the watch's
        thread; so is `on_progress`, whenever a rank says something new."""
        self._key = key
        self._on_loss = on_loss
        self._patience = patience or Patience()
        self._on_progress = on_progress
        self._clock = clock
        self._vitals = Vitals.of(world)
        self._hellos: dict[int, Hello] = {}
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((host, 0), backlog=world)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[_Peer] = []  # the watch's thread alone
        self._greeted: deque[socket.socket] = deque()  # authenticated, not yet listened to
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """What ranks dial."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    @property
    def loss(self) -> Loss | None:
        """What ended the group, or None while all ranks live."""
        return self._vitals.loss

    @property
    def hellos(self) -> Mapping[int, Hello]:
        """Of the ranks that have joined."""
        return dict(self._hellos)

    def launched(self) -> None:
        """All ranks run: from now on the patience for their first word counts."""
        now = self._clock()
        self._update(lambda vitals: vitals.launched(now))

    def wait_joined(self) -> Mapping[int, Hello]:
        """Returns once all ranks have said their first word, or one of the group is lost: look
        at `loss`. From `launched` on the patience bounds it."""
        with self._changed:
            self._changed.wait_for(lambda: self._vitals.joined or self._vitals.loss is not None)
            return dict(self._hellos)

    def report(self, rank: int, why: str) -> None:
        """Whoever runs the ranks saw one end. Callable from any thread."""
        self._update(lambda vitals: vitals.lost(rank, why))

    def close(self) -> None:
        """No word of anybody counts any more. Ranks see the end of the connection. Idempotent."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * BEAT_SECONDS + 1.0)

    def _run(self) -> None:
        next_beat = self._clock()
        while not self._over.is_set():
            while self._greeted:
                self._welcome(self._greeted.popleft())
            for key, _ in self._selector.select(max(0.0, next_beat - self._clock())):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            # Judged after reading: words that waited while this thread could not run do count.
            self._update(lambda vitals: vitals.judged(self._clock(), self._patience))
            if self._clock() >= next_beat:
                self._beat()
                next_beat = self._clock() + BEAT_SECONDS
        for peer in list(self._peers):
            self._drop(peer)
        self._selector.close()
        self._listener.close()

    def _update(self, change: Callable[[Vitals], Vitals]) -> None:
        with self._changed:
            before = self._vitals
            self._vitals = after = change(before)
            self._changed.notify_all()
        if before.loss is None and after.loss is not None and not self._over.is_set():
            self._on_loss(after.loss)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            # In a thread of its own: a stranger that stays silent holds up nobody.
            threading.Thread(
                target=self._greet, args=(connection,), name="pulse-greeting", daemon=True
            ).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            admit(connection, self._key)
        except (AuthError, OSError):
            connection.close()
            return
        self._greeted.append(connection)

    def _welcome(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        peer = _Peer(connection, bytearray())
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: "_Peer") -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.buffer += data
        try:
            messages = list(unframed(peer.buffer))
        except ValueError:
            messages, data = [], b""
        for message in messages:
            self._take(peer, message)
        if not data:
            self._drop(peer)
            if peer.rank is not None:
                self.report(peer.rank, "its process ended")

    def _take(self, peer: "_Peer", message: dict[str, Any]) -> None:
        now = self._clock()
        if "rank" in message:
            hello = Hello(message["rank"], message["host"], message["pid"], message["same"])
            if hello.rank not in self._vitals.ranks or hello.rank in self._hellos:
                self._drop(peer)
                return
            peer.rank = rank = hello.rank
            self._hellos[rank] = hello
            self._update(lambda v: v.heard(rank, now, host=hello.host, phase=_FIRST_PHASE))
        elif peer.rank is None:
            self._drop(peer)
        elif "failed" in message:
            failed, why = peer.rank, message["failed"]
            self._update(lambda vitals: vitals.failed(failed, why, now))
        else:
            rank, phase = peer.rank, message["phase"]
            self._update(lambda vitals: vitals.heard(rank, now, phase=phase))
            said = (phase, message["what"], message["share"])
            if said != peer.said:
                peer.said = said
                self._on_progress(Progress(rank, self._hellos[rank].host, *said))

    def _beat(self) -> None:
        for peer in self._peers:
            # A full buffer is a peer that does not read: its own silence is judged.
            with suppress(OSError):
                peer.connection.send(b"\0")

    def _drop(self, peer: "_Peer") -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()


@dataclass(slots=True, eq=False)
class _Peer:
    connection: socket.socket
    buffer: bytearray
    rank: int | None = None
    said: tuple[str, str, float | None] = (_FIRST_PHASE, "", None)


def mismatch(hellos: Mapping[int, Hello]) -> str | None:
    """In what the ranks differ though they must not, in a sentence; None where they agree."""
    first = hellos[min(hellos)]
    for other in hellos.values():
        for what in sorted(set(first.same) | set(other.same)):
            ours, theirs = first.same.get(what, "none"), other.same.get(what, "none")
            if ours != theirs:
                return (
                    f"rank {first.rank} on {first.host} has {what} {ours}, but rank {other.rank} "
                    f"on {other.host} has {theirs}: all nodes of a group need the same"
                )
    return None


def frame(message: Mapping[str, Any]) -> bytes:
    body = msgpack.packb(message)
    return _LENGTH.pack(len(body)) + bytes(body)


def unframed(buffer: bytearray) -> list[dict[str, Any]]:
    """Takes the whole frames out of `buffer`. Raises ValueError for what is none."""
    messages = []
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        if length > _LONGEST_FRAME:
            raise ValueError(f"a frame of {length} bytes")
        if len(buffer) < _LENGTH.size + length:
            break
        message = msgpack.unpackb(bytes(buffer[_LENGTH.size : _LENGTH.size + length]))
        if not isinstance(message, dict):
            raise ValueError("a frame that is no map")
        messages.append(message)
        del buffer[: _LENGTH.size + length]
    return messages
