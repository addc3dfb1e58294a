"""The client: pages, errors by kind, and no write without the lead."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shoal.operator.kube.access import Access, Token
from shoal.operator.kube.client import Api
from shoal.operator.kube.errors import ApiError, NotLeading
from shoal.operator.kube.kinds import CONFIG_MAPS, PODS
from tests.operator.kube.fake_api import Answer, FakeApi, serving

MINE = {"app.kubernetes.io/managed-by": "shoal-operator"}


def run(
    check: Callable[[FakeApi, Api], Coroutine[Any, Any, None]], *, leads: bool = True
) -> list[tuple[str, int]]:
    counted: list[tuple[str, int]] = []

    async def main() -> None:
        async with serving(FakeApi()) as fake:
            access = Access(fake.url, Token(time.monotonic, text="secret"), "shoal")
            async with Api(
                access, may_write=lambda: leads, count=lambda *call: counted.append(call)
            ) as api:
                await check(fake, api)

    asyncio.run(main())
    return counted


def pod(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default", "labels": MINE}, "spec": {}}


def test_lists_come_in_pages() -> None:
    """All of them, each with what a list leaves out, and metadata alone where that will do."""

    async def check(fake: FakeApi, api: Api) -> None:
        for index in range(250):
            fake.put(PODS, pod(f"p{index:03}"))
        fake.put(PODS, {"metadata": {"name": "other", "namespace": "default"}})
        sizes, found = [], []
        async for items, version in api.pages(PODS, None):
            sizes.append(len(items))
            found += items
            assert int(version) >= 350
        assert sizes == [100, 100, 50]
        assert {item["kind"] for item in found} == {"Pod"}
        async for items, _ in api.pages(PODS, "default", metadata_only=True):
            assert len(items) == 250
            assert all(set(item) == {"metadata"} for item in items)

    run(check)


def test_a_watch_tells_what_happens_after_a_version() -> None:
    """Events come one by one, of what the selector of the kind matches alone."""

    async def check(fake: FakeApi, api: Api) -> None:
        fake.put(PODS, pod("before"))
        since = fake.version
        fake.put(PODS, pod("p"))
        fake.put(PODS, {"metadata": {"name": "other", "namespace": "default"}})
        fake.remove(PODS, "default", "p")
        told = []
        async for event in api.watch(PODS, "default", since, 300):
            told.append((event["type"], event["object"]["metadata"]["name"]))
            if len(told) == 2:
                break
        assert told == [("ADDED", "p"), ("DELETED", "p")]

    run(check)


def test_errors_say_what_can_be_done() -> None:
    """Gone, taken, outrun, refused, unreachable: each is told apart."""

    async def check(fake: FakeApi, api: Api) -> None:
        with pytest.raises(ApiError) as error:
            await api.get(PODS, "default", "none")
        assert error.value.not_found
        fake.put(PODS, pod("p"))
        with pytest.raises(ApiError) as error:
            await api.create(PODS, pod("p"))
        assert error.value.exists and not error.value.conflict
        with pytest.raises(ApiError) as error:
            await api.delete(PODS, "default", "p", "another uid")
        assert error.value.conflict
        fake.refuse = lambda *_: Answer(422, "Invalid", "spec.x: not so")
        with pytest.raises(ApiError) as error:
            await api.apply(CONFIG_MAPS, pod("c"))
        assert error.value.refused and "spec.x: not so" in str(error.value)
        fake.away = True
        with pytest.raises(ApiError) as error:
            await api.get(PODS, "default", "p")
        assert error.value.status == 503 and not error.value.refused

    calls = run(check)
    assert [code for _, code in calls] == [404, 409, 409, 422, 503]


def test_a_server_that_is_not_there_is_an_error_of_its_own() -> None:
    """Status 0: nobody answered."""

    async def main() -> None:
        access = Access("http://127.0.0.1:1", Token(time.monotonic), "shoal")
        async with Api(access, may_write=lambda: True, count=lambda *_: None) as api:
            with pytest.raises(ApiError) as error:
                await api.get(PODS, "default", "p")
            assert error.value.status == 0

    asyncio.run(main())


def test_an_answer_that_cannot_be_read_is_an_error_of_the_call() -> None:
    """It ends neither a watch's task nor the process."""

    async def check(fake: FakeApi, api: Api) -> None:
        fake.garbled = True
        with pytest.raises(ApiError, match="Unreadable"):
            await api.get(PODS, "default", "p")
        with pytest.raises(ApiError, match="Unreadable"):
            await api.create(PODS, pod("p"))

    run(check)


def test_who_does_not_lead_does_not_write() -> None:
    """Reading is free; a write is not even sent."""

    async def check(fake: FakeApi, api: Api) -> None:
        fake.put(PODS, pod("p"))
        assert (await api.get(PODS, "default", "p"))["metadata"]["name"] == "p"
        with pytest.raises(NotLeading):
            await api.merge(PODS, "default", "p", {"metadata": {}})
        assert fake.writes == []

    run(check, leads=False)
