"""The operator's own pages: /healthz and /readyz for the kubelet, /metrics for Prometheus."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

# Why it is not so, or None where all is well.
Probe = Callable[[], str | None]


@asynccontextmanager
async def serve_probes(host: str, port: int, healthy: Probe, ready: Probe) -> AsyncIterator[int]:
    """Serves /healthz and /readyz: 200, or 503 with the reason. Yields the port it got."""

    def page(probe: Probe) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            problem = probe()
            return web.Response(text=problem or "ok", status=503 if problem else 200)

        return answer

    app = web.Application()
    app.router.add_get("/healthz", page(healthy))
    app.router.add_get("/readyz", page(ready))
    async with _served(app, host, port) as got:
        yield got


@asynccontextmanager
async def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> AsyncIterator[int]:
    """Serves /metrics. Yields the port it got."""

    async def answer(_: web.Request) -> web.Response:
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(registry), headers=headers)

    app = web.Application()
    app.router.add_get("/metrics", answer)
    async with _served(app, host, port) as got:
        yield got


@asynccontextmanager
async def _served(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
