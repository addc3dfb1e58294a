"""Readiness and liveness by grpc.health.v1, the kubelet's gRPC probes on one machine."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# Asks a health service by name, within so many seconds; whether it says SERVING.
Check = Callable[[str, float], Awaitable[bool]]
OpenHealth = Callable[[str], AbstractAsyncContextManager[Check]]

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    # Processes come and go: a connection that failed is tried again soon, and not shared.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)


@asynccontextmanager
async def open_health(address: str) -> AsyncIterator[Check]:
    """A connection to the health services at `host:port`; no answer counts as no."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(service: str, seconds: float) -> bool:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                answer = await stub.Check(request, timeout=seconds)
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        yield check
