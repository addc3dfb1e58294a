"""Free TCP ports for processes that share one address.

A port is probed by binding it and given to one pod only; still, another program may take it
before the pod's process does. Then that process fails to listen, ends, and is started again
with another. Ports are taken below the range from which systems draw ports for outgoing
connections, so that those do not collide with them.
"""

import errno
import random
import socket
from collections.abc import Collection
from typing import Final

FIRST, LAST = 20_000, 32_000
_TRIES: Final = 500


class NoFreePort(OSError):
    """Every port that was tried is taken."""

    def __init__(self) -> None:
        super().__init__(f"no free TCP port found between {FIRST} and {LAST} on this machine")


class Ports:
    """Hands out ports; what was handed out and not given back is not handed out again."""

    def __init__(self, rng: random.Random, host: str = "127.0.0.1") -> None:
        self._rng = rng
        self._host = host
        self._given: set[int] = set()

    def take(self, preferred: int | None = None) -> int:
        """A free port: `preferred`, where it is one. Raises NoFreePort."""
        if preferred is not None and self._free(preferred):
            return self._give(preferred)
        for _ in range(_TRIES):
            port = self._rng.randrange(FIRST, LAST)
            if self._free(port):
                return self._give(port)
        raise NoFreePort

    def give_back(self, ports: Collection[int]) -> None:
        self._given.difference_update(ports)

    def _free(self, port: int) -> bool:
        return port not in self._given and is_free(self._host, port)

    def _give(self, port: int) -> int:
        self._given.add(port)
        return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. An address that is not of this machine raises."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: a port in TIME_WAIT is free, one that somebody listens on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def reachable(host: str) -> str:
    """How this machine reaches a server that listens on `host`, as a part of host:port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
