"""Counts of durations in the routers' logarithmic buckets, with exact sums and differences.

Bucket `k` holds what lies in (2**(k/4 - 14), 2**((k+1)/4 - 14)] seconds, as in
router's histogram: a quantile is known to a fifth. Frozen; the counts of several routers add up,
and two reports of one router differ by what happened between them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from math import ceil, log2
from typing import Final

from shoal.api.v1 import router_pb2

PER_OCTAVE = 4
LOWEST = -14  # 2**-14 s
CONCENTRATED: Final = 0.4  # of all observations in one bucket: it says nothing of where inside


@dataclass(frozen=True, slots=True)
class Durations:
    """`counts[k]` observations lie in bucket `k`; buckets beyond the last are empty."""

    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, message: router_pb2.Durations) -> "Durations":
        """Reads what a router reports."""
        return cls((*[0] * message.first, *message.counts))

    @classmethod
    def merged(cls, parts: Iterable["Durations"]) -> "Durations":
        """The observations of all parts."""
        columns = zip_longest(*(part.counts for part in parts), fillvalue=0)
        return cls(tuple(sum(column) for column in columns))

    @property
    def total(self) -> int:
        return sum(self.counts)

    def since(self, before: "Durations") -> "Durations":
        """What was added after `before`. A router that started anew counts from zero: where any
        count fell, all of it is new."""
        pairs = list(zip_longest(self.counts, before.counts, fillvalue=0))
        if any(now < then for now, then in pairs):
            return self
        return Durations(tuple(now - then for now, then in pairs))

    def above(self, bucket: int) -> int:
        """Observations in buckets after this one."""
        return sum(self.counts[bucket + 1 :])

    def bucket_at(self, share: float) -> int | None:
        """The bucket that holds this quantile; None where nothing was observed."""
        if not (total := self.total):
            return None
        rank = max(1, ceil(share * total))
        return next(k for k, running in enumerate(accumulate(self.counts)) if running >= rank)

    def quantile(self, share: float) -> float | None:
        """This quantile in seconds, interpolated within its bucket; None: nothing observed."""
        bucket = self.bucket_at(share)
        if bucket is None:
            return None
        below = sum(self.counts[:bucket])
        inside = (share * self.total - below) / self.counts[bucket]
        return _edge(bucket + min(1.0, max(0.0, inside)))

    def between(self, share: float) -> tuple[float, float] | None:
        """Seconds that this quantile lies between; None: nothing observed.

        Both are the interpolated one where observations spread over many buckets. Where most of
        them share the quantile's bucket or one beside it (a lognormal with a sigma below about
        0.17), interpolation would be a guess, and the edges of its bucket are all that is known.
        """
        bucket, found = self.bucket_at(share), self.quantile(share)
        if bucket is None or found is None:
            return None
        if max(self.counts[max(0, bucket - 1) : bucket + 2]) <= CONCENTRATED * self.total:
            return found, found
        return _edge(bucket), _edge(bucket + 1)


def _edge(bucket: float) -> float:
    """The lower end of a bucket in seconds; a fraction is a place inside it."""
    return float(2.0 ** (bucket / PER_OCTAVE + LOWEST))


def bucket_of(seconds: float) -> int:
    """The bucket that a duration falls into; those that are too short fall into the first."""
    return max(0, ceil(log2(seconds) * PER_OCTAVE) - 1 - LOWEST * PER_OCTAVE) if seconds > 0 else 0
