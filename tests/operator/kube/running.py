"""A whole operator in this event loop, against the fake API server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from shoal.operator.kube.access import Access, Token
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.kinds import INFERENCE_SERVICES, NODES, PODS
from shoal.operator.kube.process import operate
from shoal.operator.kube.settings import OperatorSettings, read_settings
from tests.operator.kube.fake_api import FakeApi, Json, make_ready

FLAGS = ("--metrics-port", "0", "--health-port", "0", "--pod-defaults", "")


@asynccontextmanager
async def operating(
    api: FakeApi, *flags: str, identity: str = "op", **changes: Any
) -> AsyncIterator[asyncio.Task[int]]:
    """Runs an operator until the block is left, then ends it as a crash would: without a word."""
    settings = replace(read_settings([*FLAGS, *flags], {}), identity=identity, **changes)
    task = start(api, settings)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def start(api: FakeApi, settings: OperatorSettings) -> asyncio.Task[int]:
    token = Token(time.monotonic, text="secret")
    access = Access(server=api.url, token=token, namespace="shoal")

    async def watch(
        feed: Feed, listed: Callable[[], None], stop: asyncio.Event, ready: asyncio.Event
    ) -> None:
        await _watch(api, feed)

    return asyncio.create_task(operate(settings, access, watch))


async def _watch(api: FakeApi, feed: Feed) -> None:
    """What kopf's streams do, less their connection."""
    async for kind, what, live in api.stream():
        if kind is NODES:
            feed.saw_node(live)
        elif kind is INFERENCE_SERVICES and what == "DELETED":
            feed.lost(kind, live)
        elif kind is INFERENCE_SERVICES:
            feed.saw(kind, live)


async def until(holds: Callable[[], Any], within: float = 10.0) -> None:
    """Waits for something to come about; what is not there yet is not there."""
    end = time.monotonic() + within
    while True:
        try:
            if holds():
                return
        except KeyError:
            pass
        assert time.monotonic() < end, "it never came about"
        await asyncio.sleep(0.01)


async def quiet(api: FakeApi, seconds: float = 0.4) -> None:
    """Waits until nothing was written for so long."""
    count, since = len(api.writes), time.monotonic()
    end = since + 15
    while time.monotonic() - since < seconds:
        if len(api.writes) != count:
            count, since = len(api.writes), time.monotonic()
        assert time.monotonic() < end, "it never comes to rest"
        await asyncio.sleep(0.01)


def status(api: FakeApi, name: str = "chat", namespace: str = "default") -> Json:
    found: Json = api.get(INFERENCE_SERVICES, namespace, name)["status"]
    return found


def condition(api: FakeApi, kind: str, name: str = "chat") -> Json:
    conditions = status(api, name)["conditions"]
    return next(c for c in conditions if c["type"] == kind)


def pods_become_ready(api: FakeApi) -> None:
    """Every pod that is made runs a moment later, and every pod that is deleted ends."""
    loop = asyncio.get_running_loop()

    def run(name: str, namespace: str) -> None:
        if (namespace, name) in api.objects[PODS]:
            make_ready(api, name, namespace)

    def on_create(kind: object, made: Json) -> None:
        if kind is PODS:
            meta = made["metadata"]
            loop.call_later(0.02, run, meta["name"], meta["namespace"])

    api.on_create = on_create
