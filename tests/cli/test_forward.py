"""Reaching a pod through the API server: gRPC over its websocket port forwarding."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from aiohttp import web

from shoal.api.v1 import router_pb2, router_pb2_grpc
from shoal.cli.errors import CliError
from shoal.cli.kube.config import connect
from shoal.cli.kube.forward import forwarded
from shoal.cli.load import ask_router
from tests.cli.kube_server import kubeconfig

POD_PORT = 8001
PATH = "/api/v1/namespaces/{namespace}/pods/{pod}/portforward"


class Router(router_pb2_grpc.RouterServicer):
    """Has so many services that its answer takes many frames."""

    def GetLoad(
        self, request: router_pb2.GetLoadRequest, context: grpc.ServicerContext
    ) -> router_pb2.RouterLoad:
        names = (f"team/service-{number}" for number in range(20_000))
        return router_pb2.RouterLoad(
            services=[router_pb2.ServiceLoad(service=name) for name in names]
        )


class ApiServer:
    """Forwards the ports of the pod `router` to a server of this machine."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self.port = self._loop.run_until_complete(self._start())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def stop(self) -> None:
        assert self._runner is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get(PATH, self._forward)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer t"
        assert request.query["ports"] == str(POD_PORT)
        if request.match_info["pod"] != "router":
            return web.json_response({"message": "not allowed"}, status=403)
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        for channel in (b"\x00", b"\x01"):
            await socket.send_bytes(channel + POD_PORT.to_bytes(2, "little"))
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target)

        async def back() -> None:
            while data := await reader.read(16_384):
                await socket.send_bytes(b"\x00" + data)

        answers = asyncio.create_task(back())
        async for message in socket:
            assert message.data[0] == 0
            writer.write(message.data[1:])
        writer.close()
        answers.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await answers
        return socket


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """A kubeconfig whose cluster has one router pod."""
    router = grpc.server(ThreadPoolExecutor(2))
    router_pb2_grpc.add_RouterServicer_to_server(Router(), router)
    api = ApiServer(router.add_insecure_port("127.0.0.1:0"))
    router.start()
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig(f"http://127.0.0.1:{api.port}"))
    yield path
    api.stop()
    router.stop(0).wait()


def test_a_router_pod_answers(config: Path) -> None:
    """A long answer comes whole, twice, and no socket is left behind."""
    client, _ = connect(str(config), None)
    for _ in range(2):
        with forwarded(client, "team", "router", POD_PORT) as address:
            assert len(ask_router(address, 10.0).services) == 20_000
    assert not Path(address.removeprefix("unix:")).exists()


def test_a_pod_that_may_not_be_reached(config: Path) -> None:
    """The sentence names the pod and the permission."""
    client, _ = connect(str(config), None)
    with pytest.raises(CliError) as caught, forwarded(client, "team", "other", POD_PORT):
        pass
    assert "team/other" in caught.value.message
    assert "pods/portforward" in caught.value.message
    assert "403" in caught.value.message
