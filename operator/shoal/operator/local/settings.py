"""What a supervisor is told, and what it tells.

`shoal.operator.local.supervisor.supervise(store, settings, on_update=...)` takes the one and
calls back with the other; everything else passes through the store.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from shoal.api.names import PORT_ROUTER_GRPC, PORT_ROUTER_HTTP


@dataclass(frozen=True, slots=True)
class SupervisorSettings:
    """Where the router listens, and the few numbers of a supervisor. Seconds throughout."""

    host: str = "127.0.0.1"  # the router's; workers always listen on 127.0.0.1
    http_port: int = PORT_ROUTER_HTTP  # 0: any free one
    grpc_port: int = PORT_ROUTER_GRPC  # 0: any free one
    poll_seconds: float = 0.2  # between two looks at the desired state
    load_seconds: float = 0.5  # between two questions to the router
    stop_seconds: float = 15.0  # for requests in flight when everything stops
    house_seconds: float = 5.0  # between two looks at the size of logs and at what failed
    log_bytes: int = 16 * 2**20  # of one log file; one older file is kept beside it
    log_level: str = "info"  # of the router
    environ: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(dict(os.environ)))
    python: str = sys.executable  # runs every pod whose command is `python`
    router_command: Sequence[str] = ("python", "-m", "shoal.router")


Level = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Update:
    """One line of news: what happened to which thing."""

    kind: Literal["supervisor", "router", "pod", "service"]
    name: str  # of the pod or service; "router", "supervisor"
    message: str  # one sentence without a full stop, e.g. "ready after 2.1 s"
    level: Level = "info"


class NotAnAddress(OSError):
    """The router cannot listen on such a host."""

    def __init__(self, host: str, error: OSError) -> None:
        super().__init__(
            f"--host {host!r} is not an address of this machine: {error.strerror or error}; "
            f"127.0.0.1 serves this machine alone, 0.0.0.0 all that reach it"
        )


class PortTaken(OSError):
    """Somebody else listens where the router should."""

    def __init__(self, host: str, port: int, flag: str) -> None:
        super().__init__(
            f"port {port} on {host} is taken by another program; "
            f"stop that, or choose another port with {flag}"
        )
        self.host, self.port = host, port
