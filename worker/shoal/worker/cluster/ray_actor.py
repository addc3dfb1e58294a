"""The process of one rank, as Ray runs it.

In a module of its own, so that Ray's workers import it by name.
"""

import os
import socket
from dataclasses import dataclass

import psutil
import ray

from shoal.worker.host import share_cores

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class Seat:
    """Where an actor runs."""

    host: str
    ip: str
    pid: int


class RankActor:
    """One rank. `run` returns when the group's driver says so; every other end is an error."""

    def seat(self) -> Seat:
        return Seat(socket.gethostname(), ray.util.get_node_ip_address(), os.getpid())

    def run(self, invitation: bytes, rank: int) -> None:
        ip = ray.util.get_node_ip_address()
        if (name := interface_of(ip)) is not None:
            # Host names often resolve to loopback, where no other host is.
            for variable in _INTERFACE_VARIABLES:
                os.environ.setdefault(variable, name)
        share_cores()
        from shoal.worker.parallel.invitation import Invitation
        from shoal.worker.parallel.rank import run_rank

        run_rank(Invitation.unpack(invitation), rank, ip)


def interface_of(ip: str) -> str | None:
    """The network interface that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return name
    return None
