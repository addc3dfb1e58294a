"""Builders of the router's tests: a core over scripted engines, through real sockets."""

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import scripted_engine
from bench.scripted_engine import Engine, byte_model
from shoal.api.routes import Endpoint, RouteTable
from shoal.api.v1 import engine_pb2
from shoal.router.core import RouterCore
from shoal.router.dispatch import Dispatcher, DispatchSettings
from shoal.router.generation import Generation, GenerationRequest
from shoal.router.replica import ReplicaSettings

PROMPT = list(b"a prompt of some forty bytes, more or less")
QUICK = DispatchSettings(
    ReplicaSettings(
        first_pause=0.02, longest_pause=0.1, silence=0.25, health_timeout=0.3, connect_timeout=1.0
    )
)


@dataclass
class Peer:
    """One engine and where it listens."""

    engine: Engine
    server: grpc.aio.Server
    port: int


class Stage:
    """Engines behind a core. `async with Stage(2) as stage: ...`"""

    def __init__(
        self,
        engines: int | Iterable[Engine] = 1,
        *,
        settings: DispatchSettings = QUICK,
        wait: bool = True,
        **table: Any,
    ) -> None:
        """An int: so many engines of revision "r". `table`: fields of the route table."""
        if isinstance(engines, int):
            engines = [Engine(model=byte_model("r")) for _ in range(engines)]
        self._engines = list(engines)
        self._table: dict[str, Any] = {"policy": "LeastRequests", **table}
        self._wait = wait
        self.core = RouterCore(settings=settings, rng=random.Random(1))
        self.peers: list[Peer] = []

    async def __aenter__(self) -> Self:
        for engine in self._engines:
            self.peers.append(Peer(engine, *await scripted_engine.serve(engine)))
        self._ticker = asyncio.create_task(self.core.run())
        self.route()
        if self._wait:
            await self.until(lambda: self.admitted == len(self.peers))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.core.close()
        self._ticker.cancel()
        for peer in self.peers:
            await peer.server.stop(0)

    def route(self, **changes: Any) -> None:
        """Writes a table: all engines, unless `endpoints` says otherwise."""
        self._table |= {"endpoints": [self.endpoint(i) for i in range(len(self.peers))]}
        self._table |= changes
        table = RouteTable(service="chat", models=("chat",), **self._table)
        self.core.apply({"chat": table})

    def endpoint(self, index: int, **changes: Any) -> Endpoint:
        peer = self.peers[index]
        fields = {
            "name": f"e{index}",
            "address": f"127.0.0.1:{peer.port}",
            "revision": peer.engine.model.revision,
        }
        return Endpoint(**(fields | changes))

    @property
    def dispatcher(self) -> Dispatcher:
        return self.core.services["chat"].dispatcher

    @property
    def admitted(self) -> int:
        return sum(replica.available for replica in self.dispatcher.replicas.values())

    def starts(self, index: int) -> list[engine_pb2.Start]:
        return self.peers[index].engine.starts

    async def kill(self, index: int) -> None:
        """All connections break at once."""
        await self.peers[index].server.stop(0)

    async def revive(self, index: int) -> None:
        peer = self.peers[index]
        peer.server, port = await scripted_engine.serve(peer.engine, f"127.0.0.1:{peer.port}")
        assert port == peer.port

    def ask(
        self,
        prompt: list[int] | None = None,
        *,
        max_tokens: int = 8,
        temperature: float = 0.0,
        seed: int | None = None,
        **fields: Any,
    ) -> Generation:
        sampling = engine_pb2.Sampling(max_tokens=max_tokens, temperature=temperature)
        if seed is not None:
            sampling.seed = seed
        request = GenerationRequest("chat", prompt or PROMPT, sampling, **fields)
        return self.core.submit(request)

    @staticmethod
    async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Waits for something that is about to happen."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.005)

    @staticmethod
    async def read(generation: Generation) -> list[list[int]]:
        """All token ids, a list a sample."""
        answers: list[list[int]] = [[] for _ in generation.samples]
        while not generation.done:
            for output in await generation.next():
                answers[output.index] += output.token_ids
        return answers

    async def answer(self, generation: Generation) -> list[int]:
        return (await self.read(generation))[0]


@pytest.fixture
def stage() -> type[Stage]:
    return Stage


@pytest.fixture
def run() -> Callable[[Awaitable[None]], None]:
    """Runs an async test body within a bound."""

    def run(body: Awaitable[None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await body

        asyncio.run(bounded())

    return run
