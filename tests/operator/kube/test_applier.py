"""The applier, one action at a time: what is done twice is done once."""

import asyncio
import copy
import time
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from shoal.api.names import (
    ANNOTATION_DRAIN_STARTED,
    ANNOTATION_SERVES,
    LABEL_MANAGED_BY,
    LABEL_SERVICE,
    MANAGER,
)
from shoal.api.types import InFlight
from shoal.operator.actions import DrainPod, MarkServed, ResumePod, SwapWeights
from shoal.operator.kube.access import Access, Token
from shoal.operator.kube.applier import Applier
from shoal.operator.kube.book import ServiceBook
from shoal.operator.kube.client import Api
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.kinds import PODS
from shoal.operator.kube.world import World
from shoal.operator.revision import Revision
from tests.operator.conftest import CREATED, make_service
from tests.operator.kube.fake_api import FakeApi, serving

DRAIN, RESUME = DrainPod("chat-0"), ResumePod("chat-0")
CHAT = make_service()


class Bench:
    """One pod, seen by an applier whose clock moves on at every look."""

    def __init__(self, fake: FakeApi, api: Api) -> None:
        self.fake, world = fake, World()
        feed = Feed(world, ServiceBook(), lambda key, delay: None)
        self.swaps: list[tuple[str, SwapWeights]] = []
        wall = map(float, count(1000)).__next__
        self.applier = Applier(api, world, feed, wall, lambda *call: self.swaps.append(call))
        labels = {LABEL_MANAGED_BY: MANAGER, LABEL_SERVICE: "chat"}
        meta = {"name": "chat-0", "namespace": "default", "labels": labels}
        feed.saw(PODS, copy.deepcopy(fake.put(PODS, {"metadata": meta, "spec": {}})))

    def mark(self) -> str | None:
        annotations = self.fake.get(PODS, "default", "chat-0")["metadata"].get("annotations", {})
        found: str | None = annotations.get(ANNOTATION_DRAIN_STARTED)
        return found

    def put_mark(self, text: str) -> None:
        """Somebody else marks it; the applier has not seen it."""
        live = copy.deepcopy(self.fake.get(PODS, "default", "chat-0"))
        live["metadata"]["annotations"] = {ANNOTATION_DRAIN_STARTED: text}
        self.fake.put(PODS, live)


def run(check: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with serving(FakeApi()) as fake:
            access = Access(fake.url, Token(time.monotonic, text="secret"), "shoal")
            async with Api(access, may_write=lambda: True, count=lambda *_: None) as api:
                await check(Bench(fake, api))

    asyncio.run(main())


def test_a_drain_counts_from_its_first_mark() -> None:
    """Marked twice, the pod keeps the first time, and nothing is written again."""

    async def check(bench: Bench) -> None:
        await bench.applier.perform(CHAT, DRAIN)
        first, writes = bench.mark(), len(bench.fake.writes)
        await bench.applier.perform(CHAT, DRAIN)
        assert (bench.mark(), len(bench.fake.writes)) == (first, writes)

    run(check)


def test_a_swap_is_begun_and_what_it_came_to_is_written_on_the_pod() -> None:
    """Whoever calls engines hears of it once; the mark names the revision and the process."""

    async def check(bench: Bench) -> None:
        revision = Revision("0123456789", CREATED, CHAT.spec)
        swap = SwapWeights("chat-0", "10.0.0.1:9000", 1, revision, InFlight.FINISH)
        await bench.applier.perform(CHAT, swap)
        assert bench.swaps == [("default/chat", swap)]
        await bench.applier.perform(CHAT, MarkServed("chat-0", revision.name, 1))
        live = bench.fake.get(PODS, "default", "chat-0")
        assert live["metadata"]["annotations"] == {ANNOTATION_SERVES: "0123456789:1"}
        await bench.applier.perform(CHAT, MarkServed("chat-1", revision.name, 1))

    run(check)


def test_a_mark_that_was_not_seen_yet_stands() -> None:
    """The API server marks no pod that has changed; the next look sees that it is marked."""

    async def check(bench: Bench) -> None:
        bench.put_mark("900.000")
        await bench.applier.perform(CHAT, DRAIN)
        await bench.applier.perform(CHAT, DRAIN)
        assert bench.mark() == "900.000"

    run(check)


def test_a_mark_that_is_no_time_is_written_over() -> None:
    """The planner takes it for none, so it must not stay."""

    async def check(bench: Bench) -> None:
        bench.put_mark("soon")
        await bench.applier.perform(CHAT, DRAIN)
        await bench.applier.perform(CHAT, DRAIN)
        assert float(bench.mark() or "soon") >= 1000

    run(check)


def test_a_pod_that_is_called_back_can_be_marked_anew() -> None:
    """The mark goes, and going twice writes nothing."""

    async def check(bench: Bench) -> None:
        await bench.applier.perform(CHAT, DRAIN)
        first = bench.mark()
        await bench.applier.perform(CHAT, RESUME)
        writes = len(bench.fake.writes)
        await bench.applier.perform(CHAT, RESUME)
        assert bench.mark() is None and len(bench.fake.writes) == writes
        await bench.applier.perform(CHAT, DRAIN)
        assert bench.mark() not in (None, first)

    run(check)
