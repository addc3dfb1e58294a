"""Calls engines to swap their weights, and remembers what came of it, for the next plans.

A call takes as long as loading a model does, so a plan only begins it. The memory may be lost at
any time: a call is made again then. An engine that serves the revision already says so at once, and
one that is in the middle of a swap refuses until that has ended (SwapWeights in engine.proto).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

import grpc

from shoal.api.types import InFlight
from shoal.api.v1 import engine_pb2, engine_pb2_grpc
from shoal.operator.actions import SwapWeights
from shoal.operator.observe import SwapState, SwapView

log: Final = logging.getLogger(__name__)

_AGAIN_SECONDS: Final = 10.0  # after a call that failed
_LONGEST_PAUSE_SECONDS: Final = 300.0
_SILENCE_SECONDS: Final = 60.0  # of an engine, which speaks every 5 s
_CHANNEL: Final = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]
_IN_FLIGHT: Final = {
    InFlight.FINISH: engine_pb2.IN_FLIGHT_FINISH,
    InFlight.RECOMPUTE: engine_pb2.IN_FLIGHT_RECOMPUTE,
}
# Trying again would end the same way.
_FOR_GOOD: Final = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class SwapRefused(Exception):
    """The engine cannot take these weights in the place of the others; says why."""


class SwapFailed(Exception):
    """The call did not come to its end; says why."""


Call = Callable[[str, engine_pb2.SwapWeightsRequest], Awaitable[None]]


async def call_engine(address: str, request: engine_pb2.SwapWeightsRequest) -> None:
    """Returns once the engine serves the revision. Raises SwapRefused or SwapFailed. However long
    a swap takes, the engine speaks every few seconds: one that is silent is given up."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL) as to:
        phase = engine_pb2.SwapProgress.PHASE_UNSPECIFIED
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(_SILENCE_SECONDS) as limit:
                async for progress in engine_pb2_grpc.EngineStub(to).SwapWeights(request):
                    phase = progress.phase
                    limit.reschedule(now() + _SILENCE_SECONDS)
        except TimeoutError:
            said = f"the engine said nothing for {_SILENCE_SECONDS:.0f} s"
            raise SwapFailed(said) from None
        except grpc.aio.AioRpcError as error:
            said = error.details() or str(error.code())
            kind = SwapRefused if error.code() in _FOR_GOOD else SwapFailed
            raise kind(said) from None
    if phase != engine_pb2.SwapProgress.DONE:
        raise SwapFailed("the engine ended the call before the swap was done")


class Swapper:
    """The calls of one process; used in one event loop."""

    def __init__(
        self,
        changed: Callable[[str], None],
        *,
        call: Call = call_engine,
        again_seconds: float = _AGAIN_SECONDS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`changed(service)` hears when a call has ended, and when another may be made: after
        `again_seconds`, and twice as long after each failure in a row."""
        self._changed = changed
        self._call = call
        self._again_seconds = again_seconds
        self._sleep = sleep
        self._views: dict[str, dict[str, SwapView]] = {}  # by service and pod
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failures: dict[tuple[str, str], int] = {}  # in a row

    def views(self, service: str) -> Mapping[str, SwapView]:
        """By pod, how the last call stands."""
        return MappingProxyType(dict(self._views.get(service, {})))

    def begin(self, service: str, action: SwapWeights) -> None:
        """Calls the engine, unless a call to it is under way."""
        key = service, action.name
        if key in self._tasks:
            return
        before = self._views.get(service, {}).get(action.name)
        same = before is not None and before.revision == action.revision.name
        if not same:
            self._failures.pop(key, None)
        said = before.message if before is not None and same else ""
        self._show(service, action, SwapState.RUNNING, said)
        self._tasks[key] = asyncio.create_task(self._run(service, action), name=f"swap {key}")

    def keep(self, service: str, pods: Collection[str]) -> None:
        """Forgets calls to pods that are not among these."""
        for name in self._views.get(service, {}).keys() - set(pods):
            if (task := self._tasks.pop((service, name), None)) is not None:
                task.cancel()
            self._forget(service, name)

    async def close(self) -> None:
        """Breaks all calls off, and forgets them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._views.clear()
        self._failures.clear()

    async def _run(self, service: str, action: SwapWeights) -> None:
        model = action.revision.spec.model
        request = engine_pb2.SwapWeightsRequest(
            uri=model.uri,
            model_revision=model.revision or "",
            revision=action.revision.name,
            in_flight=_IN_FLIGHT[action.in_flight],
        )
        state, said = SwapState.DONE, ""
        try:
            await self._call(action.address, request)
        except SwapRefused as refused:
            state, said = SwapState.REFUSED, str(refused)
        except SwapFailed as failed:
            state, said = SwapState.FAILED, str(failed)
        if state is not SwapState.DONE:
            log.warning("%s: weights of %s: %s", action.name, request.revision, said)
        self._show(service, action, state, said)
        self._changed(service)
        if state is SwapState.FAILED:
            failures = self._failures[service, action.name] = (
                self._failures.get((service, action.name), 0) + 1
            )
            pause = self._again_seconds * 2 ** (failures - 1)
            await self._sleep(min(pause, _LONGEST_PAUSE_SECONDS))
            self._show(service, action, SwapState.AGAIN, said)
        self._tasks.pop((service, action.name), None)
        if state is SwapState.FAILED:
            self._changed(service)
        else:
            self._failures.pop((service, action.name), None)

    def _show(self, service: str, action: SwapWeights, state: SwapState, said: str = "") -> None:
        view = SwapView(action.revision.name, action.restarts, state, said)
        self._views.setdefault(service, {})[action.name] = view

    def _forget(self, service: str, name: str) -> None:
        self._failures.pop((service, name), None)
        views = self._views.get(service, {})
        views.pop(name, None)
        if not views:
            self._views.pop(service, None)
