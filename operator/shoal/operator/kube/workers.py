"""Takes services off the queue and has each looked at, a few at a time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from shoal.operator.kube.errors import ApiError, NotLeading
from shoal.operator.kube.metrics import OperatorMetrics
from shoal.operator.kube.outcome import Next
from shoal.operator.kube.workqueue import WorkQueue

log: Final = logging.getLogger(__name__)

_SETTLE_SECONDS: Final = 0.25  # what was done comes to its end, or to its next step
_SOON: Final = 5  # looks in a row that may follow each other so soon
_PATIENT_SECONDS: Final = 1.0
_CROWD: Final = 4  # times as many could be at work


class Workers:
    """Runs `reconcile(key)` for keys that are due, each by one task at a time."""

    def __init__(
        self,
        queue: WorkQueue,
        reconcile: Callable[[str], Awaitable[Next]],
        metrics: OperatorMetrics,
        clock: Callable[[], float],
        limit: int,
    ) -> None:
        self._queue = queue
        self._reconcile = reconcile
        self._metrics = metrics
        self._clock = clock
        self._limit = limit
        self._news = asyncio.Event()
        self._running: dict[str, tuple[asyncio.Task[None], float]] = {}
        self._in_a_row: dict[str, int] = {}

    def add(self, key: str, delay: float = 0.0) -> None:
        """Look at a service soon."""
        self._queue.add(key, self._clock(), delay)
        self._news.set()

    def longest(self) -> float:
        """Seconds that the oldest look under way has taken so far."""
        began = min((at for _, at in self._running.values()), default=None)
        return 0.0 if began is None else self._clock() - began

    def crowd(self) -> bool:
        """Whether many services are looked at right now, beside the one that asks."""
        return (len(self._running) - 1) * _CROWD >= self._limit

    async def run(self) -> None:
        """Works until it is cancelled; then nothing that it began goes on."""
        try:
            while True:
                self._news.clear()
                self._start_due()
                due = self._queue.next_due() if len(self._running) < self._limit else None
                wait = None if due is None else max(0.0, due - self._clock())
                try:
                    await asyncio.wait_for(self._news.wait(), wait)
                except TimeoutError:
                    continue
        finally:
            tasks = [task for task, _ in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._queue.clear()
            self._running.clear()
            self._in_a_row.clear()

    def _start_due(self) -> None:
        while len(self._running) < self._limit:
            now = self._clock()
            key = self._queue.take(now)
            if key is None:
                return
            self._running[key] = asyncio.create_task(self._look(key)), now

    async def _look(self, key: str) -> None:
        began = self._clock()
        try:
            planned = await self._reconcile(key)
        except NotLeading:
            log.info("%s: left to the operator that leads now", key)
            self._queue.done(key, self._clock())
        except ApiError as error:
            self._failed(key, error)
        except Exception:
            self._metrics.failed()
            wait = self._queue.failed(key, self._clock())
            log.exception("%s: failed; tried again in %.1f s", key, wait)
        else:
            self._queue.done(key, self._clock())
            self._plan_next(key, planned)
        finally:
            self._metrics.reconciled(self._clock() - began)
            self._running.pop(key, None)
            self._news.set()

    def _plan_next(self, key: str, planned: Next) -> None:
        """A look that led to something is followed by another; one that goes on like that for
        long is slowed down."""
        if planned.acted:
            row = self._in_a_row.get(key, 0) + 1
            self._in_a_row[key] = row
            self.add(key, _SETTLE_SECONDS if row < _SOON else _PATIENT_SECONDS)
            return
        self._in_a_row.pop(key, None)
        if planned.after is not None:
            self.add(key, planned.after)

    def _failed(self, key: str, error: ApiError) -> None:
        pause = error.retry_after or 0.0
        wait = self._queue.failed(key, self._clock(), at_least=pause)
        if error.conflict or error.not_found:
            # Somebody was faster; what they did is news that is on its way.
            log.debug("%s: %s; again in %.1f s", key, error, wait)
            return
        self._metrics.failed()
        log.warning("%s: %s; tried again in %.1f s", key, error, wait)
