"""`shoal up`: the operator's planner over pods that are processes on this machine."""

import asyncio
from collections.abc import Callable

from shoal.operator.local.settings import SupervisorSettings, Update
from shoal.operator.local.store import Store


async def supervise(
    store: Store,
    settings: SupervisorSettings,
    *,
    on_update: Callable[[Update], None],
    stop: asyncio.Event | None = None,
) -> int:
    """Runs until SIGINT, SIGTERM or `stop`; returns the exit code (0: everything ended in order).

    Raises SupervisorRuns where another supervisor holds the store, and PortTaken where the
    router's ports are not free. A second signal kills all processes at once and returns 130.
    """
    raise SystemExit
