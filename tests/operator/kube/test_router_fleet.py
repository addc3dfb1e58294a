"""Routers are asked for what they act on, by whoever leads."""

import asyncio
import time

from shoal.operator.kube.routers import RouterFleet, RouterPace
from shoal.operator.observe import RouterView


class OneRouter:
    """An API server that knows one router pod."""

    async def select(self, kind, namespace, selector):
        yield [{"status": {"podIP": "10.0.0.1", "phase": "Running"}}], "1"


class Calls:
    """A connection that, like a real one, is of no use once it is closed."""

    def __init__(self, address):
        self.closed = False

    async def views(self, within):
        assert not self.closed, "a closed connection was used"
        return {"default/chat": RouterView(7)}

    async def close(self):
        self.closed = True


def test_who_leads_again_connects_anew():
    """Leadership that is lost and won again finds the routers as at the first time."""

    async def lead(fleet):
        asked = asyncio.Event()
        task = asyncio.create_task(fleet.run(asked))
        await asyncio.wait_for(asked.wait(), 5)
        views = fleet.views("default/chat")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return views

    async def main():
        fleet = RouterFleet(
            OneRouter(),
            namespace="shoal",
            selector="a=b",
            connect=Calls,
            clock=time.monotonic,
            changed=lambda service: None,
            pace=RouterPace(eager=0.05, idle=0.05),
        )
        assert await lead(fleet) == (RouterView(7),)
        assert fleet.views("default/chat") == ()
        assert await lead(fleet) == (RouterView(7),)

    asyncio.run(main())
