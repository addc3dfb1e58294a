"""Calls engines to swap their weights, and remembers what came of it, for the next plans.

A call takes as long as loading a model does, so a plan only begins it. The memory may be lost at any
time: a call that is made again joins what the engine has already (see SwapWeights in engine.proto).
"""  # noqa: E501

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
    """Returns once the engine serves the revision. Raises SwapRefused or SwapFailed."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as to:
        try:
            phase = engine_pb2.SwapProgress.PHASE_UNSPECIFIED
            async for progress in engine_pb2_grpc.EngineStub(to).SwapWeights(request):
                phase = progress.phase
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
    ) -> None:
        """`changed(service)` hears when a call has ended, and when another may be made."""
        self._changed = changed
        self._call = call
        self._again_seconds = again_seconds
        self._views: dict[str, dict[str, SwapView]] = {}  # by service and pod
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    def views(self, service: str) -> Mapping[str, SwapView]:
        """By pod, how the last call stands."""
        return MappingProxyType(dict(self._views.get(service, {})))

    def begin(self, service: str, action: SwapWeights) -> None:
        """Calls the engine, unless a call to it is under way."""
        key = service, action.name
        if key in self._tasks:
            return
        self._show(service, action, SwapState.RUNNING)
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
            await asyncio.sleep(self._again_seconds)
            self._forget(service, action.name)
        self._tasks.pop((service, action.name), None)
        if state is SwapState.FAILED:
            self._changed(service)

    def _show(self, service: str, action: SwapWeights, state: SwapState, said: str = "") -> None:
        view = SwapView(action.revision.name, action.restarts, state, said)
        self._views.setdefault(service, {})[action.name] = view

    def _forget(self, service: str, name: str) -> None:
        views = self._views.get(service, {})
        views.pop(name, None)
        if not views:
            self._views.pop(service, None)
