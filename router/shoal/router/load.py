"""The figures of one service: counted on the hot path, read by metrics and the autoscaler.

Counting is plain additions; everything derived (quantiles, Prometheus text, protobuf) is made
when somebody asks.
"""

from collections import Counter
from collections.abc import Collection

from shoal.router.histogram import Histogram

KEPT_REVISIONS = 8  # without replicas, for the analysis of a rollout that just ended


class RevisionStats:
    """What requests of one revision met. The revision "" holds those that met no replica."""

    def __init__(self) -> None:
        self.codes: Counter[int] = Counter()  # ended requests by HTTP status
        self.ttft = Histogram()
        self.itl = Histogram()
        self.duration = Histogram()
        self.broken = 0  # attempts that a replica left unfinished and that were sent again

    @property
    def ended(self) -> int:
        return self.codes.total()

    @property
    def errors(self) -> int:
        """Ended by a server's fault."""
        return sum(count for code, count in self.codes.items() if code >= 500)


class ServiceStats:
    """What a service's requests met. Times are seconds of one monotonic clock."""

    def __init__(self, now: float) -> None:
        self.arrivals = 0
        self.open = 0  # accepted and not ended, queued ones included
        self.last_activity = now
        self.retries = 0
        self.migrations = 0
        self.rejected: Counter[str] = Counter()  # by reason
        self.queue = Histogram()  # seconds in the queue, of dispatched requests
        self.route = Histogram()  # seconds to choose a replica
        self.revisions: dict[str, RevisionStats] = {}
        self.starts_per_second = 0.0  # moving average
        self._started = 0
        self._ticked_at = now

    def of(self, revision: str) -> RevisionStats:
        stats = self.revisions.get(revision)
        if stats is None:
            stats = self.revisions[revision] = RevisionStats()
        return stats

    def prune(self, revisions: Collection[str]) -> None:
        """Forgets the oldest revisions that are not among these, once there are many."""
        gone = [name for name in self.revisions if name and name not in revisions]
        for name in gone[: max(0, len(gone) - KEPT_REVISIONS)]:
            del self.revisions[name]

    def refused(self, reason: str, status: int) -> None:
        """A request was turned away on arrival."""
        self.rejected[reason] += 1
        self.of("").codes[status] += 1

    def started(self, queued_seconds: float) -> None:
        """A request (or a part that comes back) was handed to a replica."""
        self._started += 1
        self.queue.add(queued_seconds)

    def ended(self, revision: str, status: int, seconds: float, now: float) -> None:
        """A request that had been accepted is over."""
        self.open -= 1
        self.last_activity = now
        stats = self.of(revision)
        stats.codes[status] += 1
        stats.duration.add(seconds)

    def idle_seconds(self, now: float) -> float:
        return 0.0 if self.open else now - self.last_activity

    def tick(self, now: float) -> None:
        """About once a second: moves windows and averages on."""
        passed = now - self._ticked_at
        if passed <= 0:
            return
        self._ticked_at = now
        weight = min(1.0, passed / 5.0)
        self.starts_per_second += weight * (self._started / passed - self.starts_per_second)
        self._started = 0
        histograms = [self.queue, self.route]
        for stats in self.revisions.values():
            histograms += (stats.ttft, stats.itl, stats.duration)
        for histogram in histograms:
            histogram.tick(now)
