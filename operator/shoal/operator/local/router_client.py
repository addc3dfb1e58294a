"""The router's own view of its replicas, for the planner."""

from types import MappingProxyType

import grpc

from shoal.api.v1 import router_pb2, router_pb2_grpc
from shoal.operator.local.health import CHANNEL_OPTIONS
from shoal.operator.observe import EndpointView, RouterView


class RouterClient:
    """Asks one router for its load; made and closed in one event loop."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = router_pb2_grpc.RouterStub(self._channel)

    async def views(self, within: float) -> dict[str, RouterView] | None:
        """By service, what the router acts on; None where it does not answer."""
        try:
            load = await self._stub.GetLoad(router_pb2.GetLoadRequest(), timeout=within)
        except grpc.aio.AioRpcError:
            return None
        return {service.service: _view(service) for service in load.services}

    async def close(self) -> None:
        await self._channel.close(None)


def _view(load: router_pb2.ServiceLoad) -> RouterView:
    endpoints = {e.name: EndpointView(e.address, e.admitted, e.in_flight) for e in load.endpoints}
    return RouterView(load.generation, MappingProxyType(endpoints))
