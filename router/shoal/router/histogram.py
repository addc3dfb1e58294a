"""Durations in logarithmic buckets: one list increment an observation, quantiles and totals.

Bucket `k` holds what lies in (2**(k/4 - 14), 2**((k+1)/4 - 14)] seconds, so a quantile is known
to a fifth and 0.06 ms to 1,000 s take 100 buckets. The same counts serve Prometheus (totals since
the start, at every power of two) and the autoscaler (quantiles over the last minute).
"""

from bisect import bisect_left
from collections import deque
from math import ceil

PER_OCTAVE = 4
LOWEST = -14  # 2**-14 s = 0.06 ms
HIGHEST = 10  # 2**10 s = 17 min
BUCKETS = (HIGHEST - LOWEST) * PER_OCTAVE
WINDOW_SECONDS = 10.0
WINDOWS = 6
# Upper bounds of all buckets but the last, which has none.
_BOUNDS = [2 ** ((k + 1) / PER_OCTAVE + LOWEST) for k in range(BUCKETS - 1)]


class Histogram:
    """Counts of durations. `now` is of one monotonic clock, given by the caller."""

    def __init__(self) -> None:
        self.sum = 0.0
        self._current = [0] * BUCKETS
        self._total = [0] * BUCKETS  # without the current window
        self._recent: deque[list[int]] = deque(maxlen=WINDOWS - 1)
        self._window_ends = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Records `count` observations of this duration."""
        self.sum += seconds * count
        self._current[bisect_left(_BOUNDS, seconds)] += count

    def tick(self, now: float) -> None:
        """Closes the current window once its time is over. Call about once a second."""
        if now < self._window_ends:
            return
        missed = int((now - self._window_ends) // WINDOW_SECONDS) if self._window_ends else 0
        self._window_ends = now + WINDOW_SECONDS
        self._total = [a + b for a, b in zip(self._total, self._current, strict=True)]
        self._recent.append(self._current)
        for _ in range(min(missed, WINDOWS - 1)):
            self._recent.append([0] * BUCKETS)
        self._current = [0] * BUCKETS

    def quantiles(self, *shares: float) -> tuple[float, ...]:
        """Upper bounds in seconds of these quantiles over the last minute; 0 if nothing came."""
        counts = [sum(column) for column in zip(self._current, *self._recent, strict=True)]
        total = sum(counts)
        return tuple(_quantile(counts, total, share) for share in shares)

    def counts(self) -> tuple[int, list[int]]:
        """(first bucket, counts from there) since the start, without empty ones at both ends."""
        totals = [a + b for a, b in zip(self._total, self._current, strict=True)]
        filled = [bucket for bucket, count in enumerate(totals) if count]
        if not filled:
            return 0, []
        return filled[0], totals[filled[0] : filled[-1] + 1]

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) for Prometheus; the last bound is +Inf."""
        rows = []
        running = 0
        for octave in range(HIGHEST - LOWEST):
            start = octave * PER_OCTAVE
            for bucket in range(start, start + PER_OCTAVE):
                running += self._total[bucket] + self._current[bucket]
            rows.append((repr(2.0 ** (octave + 1 + LOWEST)), float(running)))
        # The highest bucket also holds everything beyond it.
        rows[-1] = ("+Inf", rows[-1][1])
        return rows


def _quantile(counts: list[int], total: int, share: float) -> float:
    if not total:
        return 0.0
    rank = ceil(share * total)
    running = 0
    for bucket, number in enumerate(counts):
        running += number
        if running >= rank:
            return float(2.0 ** ((bucket + 1) / PER_OCTAVE + LOWEST))
    return float(2.0**HIGHEST)
