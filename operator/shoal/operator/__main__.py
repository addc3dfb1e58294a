"""`python -m shoal.operator`: the operator on Kubernetes."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence

import uvloop

from shoal.operator import handlers, logs
from shoal.operator.kube.access import NoAccess, load_access
from shoal.operator.kube.feed import Feed
from shoal.operator.kube.process import operate
from shoal.operator.kube.settings import read_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the operator; returns the exit status."""
    settings = read_settings(arguments)
    logs.configure(settings.log_format, settings.log_level)
    try:
        access = load_access(os.environ, time.monotonic, kubeconfig=settings.kubeconfig)
    except NoAccess as error:
        logging.getLogger(__name__).error("%s", error)
        return 2

    async def watch(feed: Feed, listed: object, stop: asyncio.Event, ready: asyncio.Event) -> None:
        assert callable(listed)
        await handlers.watch(
            access, feed, settings.namespaces, listed=listed, stop=stop, ready=ready
        )

    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop.run_until_complete(operate(settings, access, watch))


if __name__ == "__main__":
    status = main()
    # The lease is released and nothing is written any more. Streams that are still being closed
    # hold nothing that matters, and are not waited for: a standby may start right now.
    logging.shutdown()
    os._exit(status)
