"""A pod that lends its ranks to the leader of its group.

    wait for the leader -> ray start -> ranks come and go as actors -> end with Ray

The pod answers probes all the while: `/live` as long as this process moves, `/ready` once its
node has joined the leader's cluster. A follower whose leader is gone ends, with all ranks that are
still there, is started again in its place, and joins whoever leads then.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from shoal.worker import last_words
from shoal.worker.cluster.group import Group
from shoal.worker.cluster.node import (
    HEAD_PORT,
    NodeError,
    NodeSpec,
    RayNode,
    own_address,
    stopping,
    watch,
)

LEADER_SECONDS: Final = 1800.0  # a leader may still wait for its node, or its image
ASK_SECONDS: Final = 1.0
_REFUSALS: Final = 2  # in a row: its process is gone
_SILENCES: Final = 4  # in a row: its host, or the way there
_TRY_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.5
_GONE_TRIES: Final = 3


class Health:
    """Answers the kubelet's probes on a port of its own."""

    def __init__(self, host: str, port: int) -> None:
        self.ready = False
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name is the standard library's
                good = self.path == "/live" or (self.path == "/ready" and health.ready)
                self.send_response(200 if good else 503)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """The kubelet asks every second."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Leader:
    """Whether the head still takes connections; asked every second, in a thread of its own."""

    def __init__(self, address: str, port: int, seconds: float = ASK_SECONDS) -> None:
        self._where = (address, port)
        self._seconds = seconds
        self._why: str | None = None
        threading.Thread(target=self._ask, name="leader", daemon=True).start()

    def lost(self) -> str | None:
        """Why the leader counts as gone, or None."""
        return self._why

    def _ask(self) -> None:
        refused = silent = 0
        while refused < _REFUSALS and silent < _SILENCES:
            try:
                socket.create_connection(self._where, self._seconds).close()
                refused = silent = 0
            except ConnectionRefusedError:
                refused += 1
            except OSError:
                silent += 1
            time.sleep(self._seconds)
        self._why = "the leader is gone" if refused else "the leader does not answer"


def follow(group: Group, health_host: str, health_port: int) -> int:
    """Until SIGTERM, 0, or until Ray ends, 1."""
    stop = stopping()
    health = Health(health_host, health_port)
    try:
        print(f"waiting for the leader at {group.leader}:{HEAD_PORT}", flush=True)
        address = wait_for_leader(group.leader, HEAD_PORT, stop)
        if address is None:
            return 0
        spec = NodeSpec(own_address(address), group.own_ranks, group.gpus, f"{address}:{HEAD_PORT}")
        with RayNode(spec) as node:
            node.start()
            health.ready = True
            print(f"joined {address} with room for {group.own_ranks} ranks", flush=True)
            return watch(node, stop, Leader(address, HEAD_PORT).lost)
    except NodeError as error:
        print(f"shoal worker: {error}", file=sys.stderr, flush=True)
        last_words.say(str(error))
        return 1
    finally:
        health.close()


def wait_for_leader(
    name: str,
    port: int,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
    seconds: float = LEADER_SECONDS,
) -> str | None:
    """The leader's address once it takes connections, or None when told to stop. Raises
    NodeError."""
    began = clock()
    why = "it was not asked yet"
    while not stop.is_set():
        try:
            with socket.create_connection((name, port), _TRY_SECONDS) as connection:
                return str(connection.getpeername()[0])
        except OSError as error:
            why = str(error)
        if clock() - began >= seconds:
            raise NodeError(f"the leader {name}:{port} did not come within {seconds:g} s: {why}")
        stop.wait(_LOOK_SECONDS)
    return None


def outlive(
    leader: str,
    port: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Waits until the leader's engine no longer listens, at most `seconds`; says what came of
    it. A follower's preStop hook: the leader drains with this pod's ranks."""
    began = clock()
    silent = 0
    while (waited := clock() - began) < seconds:
        try:
            socket.create_connection((leader, port), _TRY_SECONDS).close()
            silent = 0
        except OSError:
            silent += 1
        if silent == _GONE_TRIES:
            return f"the leader has ended, after {waited:.1f} s"
        sleep(_LOOK_SECONDS)
    return f"the leader still serves after {seconds:g} s"
