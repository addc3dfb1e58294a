"""A router's own view of its replicas, for the planner."""

import time
from collections.abc import Callable, Collection
from types import MappingProxyType
from typing import Final

import grpc

from shoal.api.v1 import router_pb2, router_pb2_grpc
from shoal.operator.autoscale_load import report_of
from shoal.operator.coldstart import startup_parts
from shoal.operator.observe import EndpointView, RouterView

_CHANNEL_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),
    # Processes come and go: a connection that failed is tried again soon, and not shared.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    # An answer names every replica of every service.
    ("grpc.max_receive_message_length", 64 << 20),
)


class RouterClient:
    """Asks one router for its load; made and closed in one event loop."""

    def __init__(self, address: str, wall: Callable[[], float] = time.time) -> None:
        self._address = address
        self._wall = wall
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = router_pb2_grpc.RouterStub(self._channel)

    async def views(
        self, within: float, service: str = "", scaled: Collection[str] = ()
    ) -> dict[str, RouterView] | None:
        """By service, what the router acts on, of one alone where it is named; None where it does
        not answer. Those of the services `scaled` come with what the router says of their load."""
        request = router_pb2.GetLoadRequest(service=service)
        try:
            load = await self._stub.GetLoad(request, timeout=within)
        except grpc.aio.AioRpcError as error:
            return {} if error.code() is grpc.StatusCode.NOT_FOUND else None
        now = self._wall()
        return {
            found.service: self._view(found, now if found.service in scaled else None)
            for found in load.services
        }

    async def close(self) -> None:
        await self._channel.close(None)

    def _view(self, load: router_pb2.ServiceLoad, reported: float | None) -> RouterView:
        endpoints = {
            e.name: EndpointView(
                e.address,
                e.admitted,
                e.in_flight,
                startup_parts({phase.name: phase.seconds for phase in e.startup}),
                e.warm_blocks,
            )
            for e in load.endpoints
        }
        report = report_of(load, reported) if reported is not None else None
        said = load if reported is not None else None
        return RouterView(load.generation, MappingProxyType(endpoints), self._address, report, said)
