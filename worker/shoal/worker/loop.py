"""The engine's own thread: commands in, one report out a step.

The thread applies the commands that came, runs one step while there is work, and hands a
report over; it never waits for whoever reads it. Idle, it sleeps on the condition and wakes for
its heartbeat. Callers may be on any thread.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shoal.api.blocks import BlockHash
from shoal.worker.engine import EngineLoad, EngineStats, StepOutput
from shoal.worker.request import EngineRequest, InvalidRequest
from shoal.worker.weight_sets import RevisionGone

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.25


class StepEngine(Protocol):
    """What the thread drives: `shoal.worker.engine.Engine`, or a scripted one."""

    @property
    def has_work(self) -> bool: ...

    @property
    def dead(self) -> str | None:
        """Why the engine was given up, or None while it serves."""
        ...

    @property
    def step_allowance(self) -> float:
        """Seconds that the newest step takes even on a bad day; 0: not known. Any thread may
        read it."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Raises InvalidRequest or RevisionGone."""
        ...

    def cancel(self, request_id: str, index: int | None = None) -> None: ...

    def step(self) -> StepOutput: ...

    def load(self) -> EngineLoad: ...

    def stats(self) -> EngineStats: ...

    def cached_blocks(self) -> list[BlockHash]: ...


@dataclass(frozen=True, slots=True)
class Add:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Asks for all cached blocks; `watcher` comes back with them."""

    watcher: int


@dataclass(frozen=True, slots=True)
class Act:
    """Something for the engine's thread to do between two steps. It must not raise."""

    act: Callable[[], None]


Command = Add | Cancel | Snapshot | Act


@dataclass(frozen=True, slots=True)
class Rejection:
    """A request that never began. `error` is InvalidRequest where the request is at fault, and
    RevisionGone where it names weights that are not in memory."""

    request_id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Report:
    """What one turn of the loop brought. Snapshots were taken before the step, so its changes
    to the cache come on top of them."""

    rejections: tuple[Rejection, ...]
    snapshots: tuple[tuple[int, tuple[BlockHash, ...]], ...]
    output: StepOutput | None  # None: there was no step
    load: EngineLoad
    stats: EngineStats
    step_seconds: float  # 0.0 without a step


class EngineLoop:
    """Owns the engine from `start` to `stop`; nobody else may touch it in between."""

    def __init__(
        self,
        engine: StepEngine,
        on_report: Callable[[Report], None],
        on_failure: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        """`on_report` and `on_failure` are called on the engine's thread and must return at
        once. After `on_failure` nothing runs any more: the engine gave up, or raised."""
        self._engine = engine
        self._on_report = on_report
        self._on_failure = on_failure
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._beat = clock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._beat = self._clock()
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Queues a command; it takes effect before the next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def stalled(self, seconds: float) -> bool:
        """Whether the turn in progress takes longer than `seconds` and than its step's size
        explains: a large step on a slow device is no hang."""
        return self._clock() - self._beat >= max(seconds, self._engine.step_allowance)

    def stop(self, timeout_seconds: float) -> bool:
        """Ends the thread after the step in progress; False if it is not over by then."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping and self._engine.dead is None:
                self._turn(self._next_commands())
        except Exception as error:
            log.exception("the engine failed")
            self._on_failure(f"the engine failed: {type(error).__name__}: {error}")
        else:
            if self._engine.dead is not None:
                self._on_failure(f"the engine is dead: {self._engine.dead}")

    def _next_commands(self) -> list[Command]:
        """Waits for commands, unless there is work; gives up after a heartbeat."""
        with self._wake:
            if not self._commands and not self._engine.has_work and not self._stopping:
                self._wake.wait(self._heartbeat_seconds)
            commands = list(self._commands)
            self._commands.clear()
        return commands

    def _turn(self, commands: list[Command]) -> None:
        self._beat = self._clock()
        rejections: list[Rejection] = []
        snapshots: list[tuple[int, tuple[BlockHash, ...]]] = []
        for command in commands:
            match command:
                case Add(request):
                    try:
                        self._engine.add(request)
                    except (InvalidRequest, RevisionGone) as error:
                        rejections.append(Rejection(request.request_id, error))
                    except Exception as error:  # one request's fault must not end the others
                        log.exception("request %s failed on admission", request.request_id)
                        rejections.append(Rejection(request.request_id, error))
                case Cancel(request_id, index):
                    self._engine.cancel(request_id, index)
                case Snapshot(watcher):
                    snapshots.append((watcher, tuple(self._engine.cached_blocks())))
                case Act(act):
                    act()
        output, seconds = None, 0.0
        if self._engine.has_work:
            started = self._clock()
            output = self._engine.step()
            seconds = self._clock() - started
        elif not commands:
            return
        self._on_report(
            Report(
                tuple(rejections),
                tuple(snapshots),
                output,
                self._engine.load(),
                self._engine.stats(),
                seconds,
            )
        )
