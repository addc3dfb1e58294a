"""A hot swap from request to last word: who is asked for what, in which order.

    resolve -> examine -> read -> let go -> load -> check -> swap

Everything up to the swap leaves what is active as it was. Once the new files were read and found
whole, the revision before the active one goes, to make room. One swap at a time.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from shoal.api.v1 import engine_pb2
from shoal.worker.errand import errand, in_own_thread
from shoal.worker.loop import Act, Command
from shoal.worker.served import Served
from shoal.worker.sources import ModelFiles, ModelNotFound, NoSpace, SourceError
from shoal.worker.weight_sets import WeightSet, WeightSets

log = logging.getLogger(__name__)

T = TypeVar("T")

PROGRESS_SECONDS = 0.25  # between two words about one phase, at least
REPEAT_SECONDS = 5.0  # between two words at most, though nothing changed: the caller waits
_DRAIN_SECONDS = 0.05  # between two looks at requests that run on weights to be freed
_ENGINE_SECONDS = 60.0  # an engine that does not come to its next step within this hangs

Progress = engine_pb2.SwapProgress


class SwapError(Exception):
    """No swap, and nothing has changed. `status` is a name of grpc.StatusCode."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def abandoned() -> SwapError:
    """Of a swap that nobody waits for any more."""
    return SwapError("CANCELLED", "the call was broken off before the swap")


class SwapEngine(Protocol):
    """The engine, between steps."""

    @property
    def weights(self) -> WeightSets: ...

    def activate(self, weights: WeightSet, *, recompute: bool) -> int: ...

    def running_on(self, number: int) -> int: ...


class Weights(Protocol):
    """Where weights lie: `shoal.worker.standby.Standby`, or a fake. Its methods raise SwapError."""

    def examine(self, path: Path) -> None: ...

    @property
    def numbers(self) -> frozenset[int]: ...

    def make_room(self, freed: int) -> None: ...

    def read(self, path: Path, sha256: str, stop: threading.Event) -> str: ...

    def load(
        self,
        number: int,
        path: Path,
        sha256: str,
        stop: threading.Event,
        progress: Callable[[float], None],
    ) -> None: ...

    def verify(self, number: int, stop: threading.Event, *, hurry: bool) -> str: ...

    def probe(self, number: int) -> None: ...

    def discard(self, number: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Text:
    """What the files of a model say besides its weights."""

    tokenizer: engine_pb2.Tokenizer
    sampling: engine_pb2.Sampling


class Swapper:
    """Owned by the server, on its event loop. `load_text` and `resolve` block, in a thread."""

    def __init__(
        self,
        engine: SwapEngine,
        weights: Weights,
        resolve: Callable[[str, str | None], ModelFiles],
        load_text: Callable[[Path], Text],
        paused: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`paused` is told how long each swap kept the engine from stepping."""
        self.engine = engine
        self.weights = weights
        self.resolve = resolve
        self.load_text = load_text
        self.paused = paused
        self.clock = clock
        self._numbers = 0  # of the set made last
        self._task: asyncio.Task[None] | None = None

    async def swap(
        self,
        request: engine_pb2.SwapWeightsRequest,
        served: Served,
        submit: Callable[[Command], None],
    ) -> AsyncGenerator[engine_pb2.SwapProgress]:
        """Progress until DONE. Raises SwapError. Closed early, it goes on in the background only
        until the loading thread has seen it."""
        if self._task is not None and not self._task.done():
            raise SwapError("ABORTED", "another swap of weights is under way here")
        run = _Run(self, request, served, submit)
        self._task = asyncio.create_task(run.perform(), name=f"swap to {request.revision}")
        # A call that was broken off leaves nobody to hear how it ended.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        said, said_at = Progress(), self.clock()
        try:
            while not self._task.done():
                await asyncio.wait((self._task,), timeout=PROGRESS_SECONDS)
                if self._task.done():
                    break
                progress, now = run.progress, self.clock()
                if progress != said or now - said_at >= REPEAT_SECONDS:
                    said, said_at = progress, now
                    yield progress
            await self._task
            yield run.progress
        finally:
            run.stop.set()

    @property
    def revisions(self) -> tuple[str, ...]:
        """Those in memory, the active one first."""
        return self.engine.weights.revisions

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers


class _Run:
    """One swap."""

    def __init__(
        self,
        swapper: Swapper,
        request: engine_pb2.SwapWeightsRequest,
        served: Served,
        submit: Callable[[Command], None],
    ) -> None:
        self.stop = threading.Event()
        self.progress = Progress(phase=Progress.LOADING)
        self._swapper = swapper
        self._request = request
        self._served = served
        self._submit = submit
        self._pause = 0.0  # seconds that the engine's thread spent on this swap

    async def perform(self) -> None:
        """Raises SwapError."""
        try:
            self.progress = await self._perform(self._request)
        except NoSpace as error:
            raise SwapError("RESOURCE_EXHAUSTED", str(error)) from error
        except ModelNotFound as error:
            raise SwapError("NOT_FOUND", str(error)) from error
        except (SourceError, OSError, ValueError) as error:
            raise SwapError("INVALID_ARGUMENT", str(error)) from error

    async def _perform(self, request: engine_pb2.SwapWeightsRequest) -> engine_pb2.SwapProgress:
        sets = self._swapper.engine.weights
        if not request.revision:
            raise SwapError("INVALID_ARGUMENT", "revision is empty, it must name the new weights")
        if request.revision == sets.active.revision:
            return Progress(phase=Progress.DONE)
        if sets.previous is not None and request.revision == sets.previous.revision:
            sha256 = await self._back(sets.previous)
        else:
            sha256 = await self._forward(request)
        self._swapper.paused(self._pause)
        return Progress(phase=Progress.DONE, pause_seconds=self._pause, sha256=sha256)

    async def _back(self, previous: WeightSet) -> str:
        """The previous weights are still there: looked at again, not loaded."""
        self.progress = Progress(phase=Progress.CHECKING)
        weights = self._swapper.weights
        sha256 = await self._beside(lambda: weights.verify(previous.number, self.stop, hurry=True))
        await self._activate(previous, self._served.find(previous.revision))
        return sha256

    async def _forward(self, request: engine_pb2.SwapWeightsRequest) -> str:
        swapper, weights = self._swapper, self._swapper.weights
        if not request.uri:
            raise SwapError("INVALID_ARGUMENT", "uri is empty, it must name a model")
        revision = request.model_revision or None
        files = await asyncio.to_thread(swapper.resolve, request.uri, revision)
        text = await asyncio.to_thread(swapper.load_text, files.path)
        served = self._served.active
        if (difference := _difference(served.tokenizer, text.tokenizer)) is not None:
            words = f"{files.path}: {difference}; weights are swapped under one tokenizer only"
            raise SwapError("FAILED_PRECONDITION", words)
        await asyncio.to_thread(weights.examine, files.path)
        active = swapper.engine.weights.active
        weights.make_room(freed=len(weights.numbers) - 1)
        await self._beside(lambda: weights.verify(active.number, self.stop, hurry=False))
        sha256 = await self._beside(lambda: weights.read(files.path, request.sha256, self.stop))
        await self._between(lambda: weights.probe(active.number))
        await self._let_go(active)
        arrived = WeightSet(swapper.next_number(), request.revision)
        self.progress = Progress(phase=Progress.LOADING)
        try:
            await self._beside(
                lambda: weights.load(arrived.number, files.path, sha256, self.stop, self._loaded)
            )
            await self._activate(arrived, _model(served, request, text))
        except Exception:
            await self._between(lambda: self._give_up(arrived))
            raise
        return sha256

    async def _activate(self, arrived: WeightSet, model: engine_pb2.Model) -> None:
        """The last look, and the swap: between two steps each."""
        swapper = self._swapper
        self.progress = Progress(phase=Progress.CHECKING)
        await self._between(lambda: swapper.weights.probe(arrived.number))
        if self.stop.is_set():
            raise abandoned()
        self.progress = Progress(phase=Progress.SWAPPING)
        self._served.expect(model)
        recompute = self._request.in_flight == engine_pb2.IN_FLIGHT_RECOMPUTE
        anew = await self._between(lambda: swapper.engine.activate(arrived, recompute=recompute))
        log.info(
            "revision %s is active; the engine paused for %.1f ms, sequences begun anew: %d",
            *(arrived.revision, 1e3 * self._pause, anew),
        )

    def _give_up(self, arrived: WeightSet) -> None:
        """Frees weights that were not swapped in; those that were, after all, stay."""
        if arrived.revision not in self._swapper.engine.weights.revisions:
            self._swapper.weights.discard(arrived.number)

    async def _let_go(self, active: WeightSet) -> None:
        """Frees all weights but the active ones (those that a swap which was broken off had begun
        to let go, too), each set once its last request has ended."""
        engine, weights = self._swapper.engine, self._swapper.weights
        others = weights.numbers - {active.number}
        if not others:
            return
        self.progress = Progress(phase=Progress.DRAINING)
        await self._between(engine.weights.retire)
        for number in sorted(others):
            while await self._between(partial(engine.running_on, number)):
                if self.stop.is_set():
                    raise abandoned()
                await asyncio.sleep(_DRAIN_SECONDS)
            await self._between(partial(weights.discard, number))

    def _loaded(self, fraction: float) -> None:
        """In the loading thread."""
        self.progress = Progress(phase=Progress.LOADING, fraction=fraction)

    async def _beside(self, call: Callable[[], T]) -> T:
        """Has a thread of the lowest priority make a call beside the engine's."""
        return await in_own_thread(call, "standby")

    async def _between(self, call: Callable[[], T]) -> T:
        """Has the engine's thread make a call between two steps, and counts its time."""
        act, answer = errand(call, self._swapper.clock)
        self._submit(Act(act))
        try:
            result, seconds = await asyncio.wait_for(answer, _ENGINE_SECONDS)
        except TimeoutError:
            words = f"the engine did not come to its next step within {_ENGINE_SECONDS:.0f} s"
            raise SwapError("ABORTED", words) from None
        self._pause += seconds
        return result


def _difference(served: engine_pb2.Tokenizer, found: engine_pb2.Tokenizer) -> str | None:
    """What makes another text of a token id; None: nothing. Templates may differ."""
    if served.tokenizer_json != found.tokenizer_json:
        return "its tokenizer is another one"
    for name in ("bos_token", "eos_token", "add_bos_token"):
        before, after = getattr(served, name), getattr(found, name)
        if before != after:
            return f"its {name} is {after!r}, expected {before!r}"
    return None


def _model(
    served: engine_pb2.Model, request: engine_pb2.SwapWeightsRequest, text: Text
) -> engine_pb2.Model:
    """What routers are told of the new revision."""
    model = engine_pb2.Model()
    model.CopyFrom(served)
    model.name, model.revision, model.hash_seed = request.uri, request.revision, request.revision
    model.tokenizer.CopyFrom(text.tokenizer)
    model.default_sampling.CopyFrom(text.sampling)
    return model
