"""Which service is looked at next. Pure: the clock is an argument.

Level-triggered: a key stands for "look at this service", however often that was asked. A key is
never worked on twice at the same time; what is asked meanwhile is done after. A failure makes
the key wait longer each time; news about it shorten that wait, but do not end it, so that a
service that always fails cannot keep the operator busy by its own events.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_NEWS_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a key waits after failures in a row: doubling between two bounds. Seconds."""

    first: float = 0.2
    longest: float = 30.0

    def wait(self, failures: int) -> float:
        # The exponent is bounded long before a float overflows.
        return min(self.longest, self.first * 2.0 ** min(failures - 1, 32))


class WorkQueue:
    """Keys, each with the time at which it is due."""

    def __init__(self, pace: Pace, jitter: Callable[[], float]) -> None:
        """`jitter` gives numbers in [0, 1): waits after failures are stretched by up to half."""
        self._pace = pace
        self._jitter = jitter
        self._due: dict[str, float] = {}  # waiting keys
        self._heap: list[tuple[float, int, str]] = []  # entries not in _due as they are: stale
        self._working: set[str] = set()
        self._asked: dict[str, float] = {}  # due times of keys that are being worked on
        self._failures: dict[str, int] = {}
        self._order = 0

    def __len__(self) -> int:
        """Keys that wait, due or not."""
        return len(self._due) + len(self._asked)

    @property
    def working(self) -> int:
        return len(self._working)

    def add(self, key: str, now: float, delay: float = 0.0) -> None:
        """Look at `key` in `delay` seconds, or sooner if that was asked already."""
        due = now + delay
        if key in self._failures:
            due = max(due, now + _NEWS_SECONDS)
        if key in self._working:
            self._asked[key] = min(due, self._asked.get(key, due))
        elif due < self._due.get(key, float("inf")):
            self._push(key, due)

    def take(self, now: float) -> str | None:
        """The key that has been due longest, which is being worked on from here; None: none is."""
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self._working.add(key)
                return key
        return None

    def next_due(self) -> float | None:
        """When `take` will have something; None while nothing waits."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) == due:
                return due
            heapq.heappop(self._heap)
        return None

    def done(self, key: str, now: float) -> None:
        """The work on `key` went well."""
        self._failures.pop(key, None)
        self._end(key)

    def failed(self, key: str, now: float, at_least: float = 0.0) -> float:
        """It did not; the key is tried again. Returns in how many seconds, without news."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        wait = max(at_least, self._pace.wait(failures) * (1 + self._jitter() / 2))
        asked = self._asked.get(key)
        # News that came meanwhile shorten the wait as later ones do.
        soon = wait if asked is None else min(wait, max(_NEWS_SECONDS, asked - now))
        self._asked[key] = now + max(at_least, soon)
        self._end(key)
        return wait

    def clear(self) -> None:
        """Forgets everything, and what is being worked on too: the workers are gone."""
        self._due.clear()
        self._heap.clear()
        self._working.clear()
        self._asked.clear()
        self._failures.clear()

    def _end(self, key: str) -> None:
        self._working.discard(key)
        due = self._asked.pop(key, None)
        if due is not None:
            self._push(key, due)

    def _push(self, key: str, due: float) -> None:
        self._order += 1
        self._due[key] = due
        heapq.heappush(self._heap, (due, self._order, key))
